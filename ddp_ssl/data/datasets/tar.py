"""Encoded images inside tar files, read by offset and size. numpy only."""

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

from ddp_ssl.utils.sealed import checksum


@dataclass(frozen=True, eq=False)
class Shards:
    """The places of encoded images: image i is `size[i]` bytes at `offset[i]` of a tar file.

    `paths` are the tar files, and `shard`, int32 `[M]`, is the index of each image's file. `offset`
    and `size` are int64 `[M]`. `crc`, uint32 `[M]`, is the CRC-32 of each image; None where earlier
    versions packed.
    """

    paths: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc: NDArray[np.uint32] | None = None
    index_crc: tuple[int, ...] | None = None
    """CRC-32 of DALI's index of each tar file."""
    _files: dict[str, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def path_of(self, i: int) -> str:
        """The tar file of image `i`."""
        return self.paths[int(self.shard[i])]

    def read(self, i: int) -> NDArray[np.uint8]:
        """The encoded image `i`, uint8 `[length]`, in any thread; raises `OSError`."""
        content = self.part(i, 0, int(self.size[i]))
        if self.crc is not None and zlib.crc32(content.data) != int(self.crc[i]):
            raise OSError(errno.EIO, "its checksum is not that of the image that was packed")
        return content

    def part(self, i: int, first: int, count: int) -> NDArray[np.uint8]:
        """Bytes `first` to `first + count` of image `i`; raises `OSError`."""
        path, at = self.path_of(i), int(self.offset[i]) + first
        content: NDArray[np.uint8] = np.empty(count, np.uint8)
        view, done = content.data, 0
        file, kept = self._open(path)
        try:
            while done < len(content):
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
        crc = None if self.crc is None else self.crc[ids]
        return replace(
            self, shard=self.shard[ids], offset=self.offset[ids], size=self.size[ids], crc=crc
        )

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
