"""Encoded images inside tar or parquet files, read by offset and size. numpy only."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import threading
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.datasets.pages import made_of
from ddp_ssl.utils.sealed import checksum

# Offsets of images that are not there, and why.
EMPTY, DAMAGED = -1, -2
ABSENT = {EMPTY: "its cell is empty", DAMAGED: "its part of the file is damaged"}


@dataclass(frozen=True, eq=False)
class Shards:
    """The places of encoded images: image i is `size[i]` bytes at `offset[i]` of a large file.

    `paths` are the files, and `shard`, int32 `[M]`, is the index of each image's file. `offset` and
    `size` are int64 `[M]`. `crc`, uint32 `[M]`, is the CRC-32 of each image; None where earlier
    versions packed. In parquet files, `part`, int32 `[M, 5]`, says how the stored bytes make the
    image (`pages.Place`), and the offsets in `ABSENT` mean that there is none.
    """

    paths: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc: NDArray[np.uint32] | None = None
    part: NDArray[np.int32] | None = None
    kind: str = "shards"
    """Or the name of another container."""
    index_crc: tuple[int, ...] | None = None
    """CRC-32 of DALI's index of each tar file."""
    _files: dict[str, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def path_of(self, i: int) -> str:
        """The file of image `i`."""
        return self.paths[int(self.shard[i])]

    def read(self, i: int) -> NDArray[np.uint8]:
        """The encoded image `i`, uint8 `[length]`, in any thread; raises `OSError`."""
        content = self.piece(i, 0, int(self.size[i]))
        if self.crc is not None and zlib.crc32(content.data) != int(self.crc[i]):
            raise OSError(errno.EIO, "its checksum is not that of the image that was packed")
        return content

    def piece(self, i: int, first: int, count: int) -> NDArray[np.uint8]:
        """Bytes `first` to `first + count` of image `i`; raises `OSError`."""
        at = int(self.offset[i])
        if at < 0:
            raise OSError(errno.ENOENT, ABSENT[at])
        part = None if self.part is None else tuple(self.part[i].tolist())
        if part is None or not part[0]:
            return self._stored(self.path_of(i), at + first, count)
        stored = self._stored(self.path_of(i), at, part[1])
        return made_of(stored, int(self.size[i]), part)[first : first + count]

    def _stored(self, path: str, at: int, count: int) -> NDArray[np.uint8]:
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

    def stream(self, url: str | None = None) -> dict[str, Any]:
        """The `paths` of the tar files and of DALI's `indices`.

        The tar files may be elsewhere, below `url`; the indices are always on disk. Raises
        `ValueError` (key `data.root`) if an index is missing.
        """
        indices = [path.removesuffix(".tar") + ".idx" for path in self.paths]
        for missing in [path for path in indices if not os.path.isfile(path)][:1]:
            raise ValueError(
                f"data.root: {missing} is missing, which data.reader=streamed needs; copy it "
                "again, or pack it again with ddp-ssl pack-shards"
            )
        for path, known in zip(indices, self.index_crc or (), strict=False):
            if checksum(Path(path)) != known:
                raise ValueError(
                    f"data.root: {path} is damaged; copy it again, or pack it again with ddp-ssl "
                    "pack-shards"
                )
        if url is None:
            return {"paths": list(self.paths), "indices": indices}
        names = [os.path.basename(path) for path in self.paths]
        return {"paths": [f"{url.rstrip('/')}/{name}" for name in names], "indices": indices}

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
        return {**self.__dict__, "_files": {}, "_lock": None}

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
