"""The images of a split: file names in one block of bytes, or pixels in one array.

2.7 million Python paths would cost hundreds of megabytes in every process. A block of bytes and two
offsets per file cost a fraction of that. numpy only.
"""

from __future__ import annotations

import errno
import hashlib
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets.tar import DAMAGED, Shards
from ddp_ssl.errors import printable

DIGESTED = 100  # images of an array whose pixels are a part of its digest
UNNAMED = "without names"  # in the place of a digest of names


@dataclass(frozen=True, eq=False)
class Split:
    """M images with labels: files below `root`, members of tar shards, or an array.

    `labels`: int64 `[M]`, -1 for unlabelled. Files and members: `names` is one uint8 block of paths
    relative to `root`, and `spans` is int64 `[M, 2]`; file i is
    `names[spans[i, 0] : spans[i, 1]]`. With `shards` the bytes lie in tar files, and a name is
    never used as a path. Array: `images` is uint8 `[M, H, W, 3]`. Make a split with `of_files` or
    `of_array`. `named` is false where the images have no names of their own, only places. Files
    below several `roots`: int64 `part` `[M]` says below which one; `root` is the first.
    An array of one's own (`of_pixels`) has any number of channels, uint16 or float32 too; image i
    is its row `rows[i]`.
    """

    labels: NDArray[np.int64]
    root: str = ""
    names: NDArray[np.uint8] | None = None
    spans: NDArray[np.int64] | None = None
    images: NDArray[Any] | None = None
    shards: Shards | None = None
    named: bool = True
    roots: tuple[str, ...] = ()
    part: NDArray[np.int64] | None = None
    rows: NDArray[np.int64] | None = None

    @staticmethod
    def of_files(root: str, names: list[bytes] | Names, labels: NDArray[np.int64]) -> Split:
        """Files by path relative to `root`."""
        found = names if isinstance(names, Names) else Names.of(names)
        block = np.frombuffer(bytes(found.block), np.uint8)
        ends = np.frombuffer(found.ends, np.int64) if found.ends else np.empty(0, np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)], ends], 1)
        assert len(spans) == len(labels)
        whole = root if is_url(root) else os.path.abspath(root)
        return Split(labels.astype(np.int64), whole, block, spans)

    @staticmethod
    def of_array(images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None) -> Split:
        """Pixels uint8 `[M, H, W]`, `[M, H, W, 1]` or `[M, H, W, 3]`; gray is repeated."""
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                f"images: expected uint8 [M, H, W], [M, H, W, 1] or [M, H, W, 3], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if images.shape[3] == 1:
            images = images.repeat(3, axis=3)
        if labels is None:
            labels = np.full(len(images), -1)
        assert len(labels) == len(images)
        return Split(np.asarray(labels, np.int64), images=np.ascontiguousarray(images))

    @staticmethod
    def of_pixels(images: NDArray[Any], labels: NDArray[np.int64]) -> Split:
        """An array `[M, H, W, C]`, which may be mapped; it is never copied as a whole."""
        assert len(images) == len(labels)
        return Split(labels, images=images, rows=np.arange(len(images)))

    @staticmethod
    def joined(splits: Sequence[Split], numbers: Sequence[NDArray[np.int64]]) -> Split:
        """Files of several roots, one split after the other; its label `c` is now `numbers[c]`."""
        labels = [new[split.labels] for split, new in zip(splits, numbers, strict=True)]
        blocks = [split.names for split in splits if split.names is not None]
        spans, first = [], 0
        for block, split in zip(blocks, splits, strict=True):
            assert split.spans is not None
            spans.append(split.spans + first)
            first += len(block)
        return Split(
            np.concatenate(labels), splits[0].root, np.concatenate(blocks), np.concatenate(spans),
            roots=tuple(split.root for split in splits),
            part=np.repeat(np.arange(len(splits)), [len(split) for split in splits]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names or pixels, and labels; independent of where the root is.

        Of an array of one's own: its shape and the pixels of `DIGESTED` images.
        """
        content = hashlib.sha256(repr(() if self.images is None else self.images.shape).encode())
        images = self.images
        if self.rows is not None and len(self):  # maybe too much to read
            images = self.pixels(np.unique(np.linspace(0, len(self) - 1, DIGESTED).astype(int)))
        for part in (self.labels, self.names, self.spans, self.rows, images):
            if part is not None:
                content.update(np.ascontiguousarray(part).data)
        return content.hexdigest()

    @cached_property
    def identity(self) -> tuple[str, str]:
        """The digest, or `UNNAMED`, and SHA-256 over the labels alone: see `not_compared`."""
        labels = hashlib.sha256(np.ascontiguousarray(self.labels).data).hexdigest()
        return self.digest if self.named else UNNAMED, labels

    @property
    def contents(self) -> tuple[str, str] | None:
        """The kind of container, and SHA-256 over the images' checksums; None without checksums.

        Shards have some images as PNGs, so only the same kind of container compares. Images of a
        damaged part of a file have no checksum.
        """
        if (shards := self.shards) is None or shards.crc is None:
            return None
        if (shards.offset == DAMAGED).any():
            return None
        return shards.kind, hashlib.sha256(np.ascontiguousarray(shards.crc).data).hexdigest()

    def known_by(self, digest: str) -> Split:
        """This split with a digest that was computed before, so that no process computes it again.

        The digest is not a field, because a split made from this one has another.
        """
        self.__dict__["digest"] = digest
        return self

    def _prefix(self, i: int) -> bytes:
        root = self.root if self.part is None else self.roots[self.part[i]]
        return os.fsencode(os.path.join(root, ""))

    def name(self, i: int) -> bytes:
        """The path of file or member `i`, relative to `root`."""
        assert self.names is not None
        assert self.spans is not None
        first, end = self.spans[i]
        return self.names[first:end].tobytes()

    def path(self, i: int) -> bytes:
        """The absolute path of file `i`."""
        assert self.shards is None
        return self._prefix(i) + self.name(i)

    def where(self, i: int) -> str:
        """The name of image `i` in lists of bad images: a path, also for a member of a shard.

        Line breaks, escape codes and the like are written as in Python. Bytes that are not UTF-8
        stay as they are.
        """
        if self.images is not None:
            return f"image {i}"
        path = os.fsdecode(self._prefix(i) + self.name(i))
        return "".join(c if "\udc80" <= c <= "\udcff" else printable(c) for c in path)

    def read(self, i: int) -> NDArray[np.uint8]:
        """The encoded image `i`, uint8 `[length]`; raises `OSError`."""
        if self.shards is not None:
            return self.shards.read(i)
        file = os.open(self.path(i), os.O_RDONLY)
        try:
            return read_all(file)
        finally:
            os.close(file)

    @property
    def channels(self) -> int:
        """Files decode to three."""
        return 3 if self.images is None else int(self.images.shape[3])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a decoded image's numbers."""
        return np.dtype(np.uint8) if self.images is None else self.images.dtype

    def pixels(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Images `ids` of an array, `[n, H, W, C]`."""
        assert self.images is not None
        return np.ascontiguousarray(self.images[ids if self.rows is None else self.rows[ids]])

    def subset(self, ids: NDArray[np.int64]) -> Split:
        """The images `ids`, int64 `[m]`, in that order; the block of names is shared."""
        return replace(
            self,
            labels=self.labels[ids],
            spans=None if self.spans is None else self.spans[ids],
            images=self.images[ids]
            if self.images is not None and self.rows is None
            else self.images,
            rows=None if self.rows is None else self.rows[ids],
            shards=None if self.shards is None else self.shards.subset(ids),
            part=None if self.part is None else self.part[ids],
        )


def not_compared(images: str, labels: str, saved: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which key of two identities does not count: that of the `images` or that of their `labels`.

    The labels decide where one of the two knows no names of images. Earlier versions saved the
    digest of images alone.
    """
    unnamed = UNNAMED in (saved.get(images), now.get(images))
    return images if unnamed and labels in saved else labels


def read_all(file: int) -> NDArray[np.uint8]:
    """A whole open file, uint8 `[length]`; raises `OSError`."""
    content: NDArray[np.uint8] = np.empty(os.fstat(file).st_size, np.uint8)
    view, done = content.data, 0
    while done < len(content):
        count = os.readv(file, [view[done:]])
        if count == 0:
            raise OSError(errno.EIO, f"ends after {done} of {len(content)} bytes")
        done += count
    return content


class Names:
    """File names one after the other: a block of bytes and the offset where each name ends."""

    def __init__(self) -> None:
        self.block = bytearray()
        self.ends = array("q")

    @classmethod
    def of(cls, names: list[bytes]) -> Names:
        made = cls()
        for name in names:
            made.append(name)
        return made

    def append(self, name: bytes) -> None:
        self.block += name
        self.ends.append(len(self.block))

    def __len__(self) -> int:
        return len(self.ends)
