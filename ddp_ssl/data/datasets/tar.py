"""Encoded images inside shards, tar or parquet files, here or in a store, by offset and size."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import threading
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets import remote
from ddp_ssl.data.datasets.pages import made_of
from ddp_ssl.utils.once import warn_once

OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # faults of this process, not of the image
# Offsets of images that are not there, and why.
EMPTY, DAMAGED = -1, -2
ABSENT = {EMPTY: "its cell is empty", DAMAGED: "its part of the file is damaged"}


@dataclass(frozen=True, eq=False)
class Shards:
    """The places of encoded images: image i is `size[i]` bytes at `offset[i]` of a large file.

    `paths` are the files, or their addresses; `origins`, where those that are copies come from;
    `tags`, the stamp of the content that is meant, where they or their origins are in a store.
    `shard`, int32 `[M]`, is the index of each image's file. `offset` and `size` are int64 `[M]`.
    `crc`, uint32 `[M]`, is the CRC-32 of each image; None where earlier versions packed. In parquet
    files, `part`, int32 `[M, 5]`, says how the stored bytes make the image (`pages.Place`), and the
    offsets in `ABSENT` mean that there is none.
    """

    paths: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc: NDArray[np.uint32] | None = None
    part: NDArray[np.int32] | None = None
    kind: str = "shards"
    """Or the name of another container."""
    origins: tuple[str, ...] | None = None
    tags: tuple[str | None, ...] | None = None
    _files: dict[str, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def path_of(self, i: int) -> str:
        """The file of image `i`."""
        return self.paths[int(self.shard[i])]

    @functools.cached_property
    def is_far(self) -> bool:
        """Whether files are in a store."""
        return any(map(is_url, self.paths))

    @functools.cached_property
    def _originals(self) -> Shards:
        return replace(self, paths=self.origins or self.paths, origins=None)

    def read(self, i: int) -> NDArray[np.uint8]:
        """The encoded image `i`, uint8 `[length]`, in any thread; raises `OSError`, `StoreError`.

        An image that is missing or damaged in a copy is read from where the copy was made.
        """
        path = self.path_of(i)
        try:
            return self._whole(i)
        except OSError as error:
            origin = self._originals.path_of(i)
            if origin == path or self.offset[i] < 0 or error.errno in OURS:
                raise
            warn_once(
                f"data.stage: files in {os.path.dirname(path)} are damaged or gone: their images "
                f"are read from {os.path.dirname(origin)}"
            )
        return self._originals.read(i)

    def _whole(self, i: int) -> NDArray[np.uint8]:
        content = self.piece(i, 0, int(self.size[i]))
        if self.crc is not None and zlib.crc32(content.data) != int(self.crc[i]):
            raise OSError(errno.EIO, "its checksum is not that of the image that was packed")
        return content

    def piece(self, i: int, first: int, count: int) -> NDArray[np.uint8]:
        """Bytes `first` to `first + count` of image `i`; raises `OSError`, `StoreError`."""
        at = int(self.offset[i])
        if at < 0:
            raise OSError(errno.ENOENT, ABSENT[at])
        part = None if self.part is None else tuple(self.part[i].tolist())
        if part is None or not part[0]:
            return self._stored(int(self.shard[i]), at + first, count)
        stored = self._stored(int(self.shard[i]), at, part[1])
        return made_of(stored, int(self.size[i]), part)[first : first + count]

    def _stored(self, number: int, at: int, count: int) -> NDArray[np.uint8]:
        path = self.paths[number]
        if is_url(path):
            return remote.read(path, at, count, self.tags[number] if self.tags else None)
        content: NDArray[np.uint8] = np.empty(count, np.uint8)
        view, done = content.data, 0
        file, kept = self._open(path)
        try:
            while done < len(content):
                # With its own offset: processes may share the open file.
                count = os.preadv(file, [view[done:]], at + done)
                if count == 0:
                    raise OSError(errno.EIO, f"shard ends before byte {at + len(content)}")
                done += count
        finally:
            if not kept:
                os.close(file)
        return content

    def subset(self, ids: NDArray[np.int64]) -> Shards:
        """The images `ids`; open files are shared."""
        return replace(
            self,
            shard=self.shard[ids],
            offset=self.offset[ids],
            size=self.size[ids],
            crc=None if self.crc is None else self.crc[ids],
            part=None if self.part is None else self.part[ids],
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: a process that is spawned opens its own."""
        kept = {key: value for key, value in self.__dict__.items() if key != "_originals"}
        return {**kept, "_files": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})

    def _open(self, path: str) -> tuple[int, bool]:
        """A descriptor, and whether it stays open: it does until there are too many."""
        with self._lock:
            if path in self._files:
                return self._files[path], True
            file = os.open(path, os.O_RDONLY)
            kept = len(self._files) < _most_open()
            if kept:
                self._files[path] = file
            return file, kept


@functools.cache
def _most_open() -> int:
    """Half of the files that this process may have open, after raising its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft // 2 if soft > 0 else 1 << 16
