"""Tar shards read by the project's own order: bytes by offset and size. numpy only."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Shards:
    """Where the encoded images are: image i is `size[i]` bytes at `offset[i]` of a tar file.

    `paths` are the tar files, `shard` int32 `[M]` says which one; `offset` and `size` int64 `[M]`.
    """

    paths: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    _files: dict[str, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def path_of(self, i: int) -> str:
        """The tar file of image `i`."""
        return self.paths[self.shard[i]]

    def read(self, i: int) -> NDArray[np.uint8]:
        """The encoded image `i`, uint8 `[length]`; raises `OSError`. For any number of threads."""
        path, at = self.path_of(i), int(self.offset[i])
        content = np.empty(int(self.size[i]), np.uint8)
        view, done = memoryview(content), 0
        file = self._open(path)
        while done < len(content):
            count = os.preadv(file, [view[done:]], at + done)
            if count == 0:
                raise OSError(errno.EIO, f"shard ends before byte {at + len(content)}")
            done += count
        return content

    def subset(self, ids: NDArray[np.int64]) -> Shards:
        """The images `ids`; open files are shared."""
        return replace(self, shard=self.shard[ids], offset=self.offset[ids], size=self.size[ids])

    def _open(self, path: str) -> int:
        """A descriptor, kept open: shards are few and read all the time."""
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]
