"""Which files a root holds, and all that is asked of the file system for containers.

Roots and paths are texts, not `Path`s.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets import remote
from ddp_ssl.data.datasets.base import place_of
from ddp_ssl.data.datasets.folders import LIKE_A_SPLIT, TRAIN, VAL
from ddp_ssl.data.datasets.remote import Stamp, joined
from ddp_ssl.data.datasets.scan import scan
from ddp_ssl.errors import may_pass

if TYPE_CHECKING:
    from ddp_ssl.config import Data

T = TypeVar("T")

BUFFER = 1 << 20  # bytes read at a time
RETRIES = (0.1, 1.0)  # seconds, after an error of the file system that may pass
# What follows the split in a file's name.
NUMBER = re.compile(r"([-_.](shard|part))?[-_.]?\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{8,})?$")

# --- the file system: all that is asked of it ----------------------------------------------------


class Entry(NamedTuple):
    name: str
    is_folder: bool


def root_of(data: Data) -> str:
    """`data.root`, absolute."""
    return place_of(data.root or "")


def entries(folder: str) -> list[Entry]:
    """What is in a folder, sorted; raises `OSError`, `StoreError`."""
    if is_url(folder):
        return [Entry(*found) for found in remote.entries(folder)]
    with os.scandir(folder) as found:
        return sorted(Entry(entry.name, entry.is_dir()) for entry in found)


def holds_images(folder: str) -> bool:
    """Whether there are images as files below a folder; in a store they are not looked for."""
    return os.path.isdir(folder) and next(scan(os.fsencode(folder)), None) is not None


def open_file(path: str, buffer: int = BUFFER) -> BinaryIO:
    """A file to be read in order, `buffer` bytes at a time; raises `OSError`, `StoreError`."""
    return remote.opened(path) if is_url(path) else open(path, "rb", buffering=buffer)


def retried(path: str, read: Callable[[], T]) -> T:
    """What `read` returns, which is called again after an error of the file system that may pass.

    Raises `ValueError` where the file system does not give the file.
    """
    for pause in (*RETRIES, None):
        try:
            return read()
        except OSError as error:
            if pause is None or not may_pass(error):
                why = error.strerror or error
                raise ValueError(f"data.root: {path} cannot be read: {why}") from None
            time.sleep(pause)
    raise AssertionError


# --- which files ---------------------------------------------------------------------------------


class Files(NamedTuple):
    """The files of each split, relative to `base`, and the splits that are not used."""

    base: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    unused: tuple[str, ...]
    stamps: Mapping[str, Stamp] = MappingProxyType({})
    copied: Mapping[str, str] = MappingProxyType({})  # the paths of those that were staged

    def path(self, name: str) -> str:
        """Where a file is read."""
        return self.copied.get(name) or self.origin(name)

    def origin(self, name: str) -> str:
        return joined(self.base, name)

    def places(self, names: Sequence[str]) -> dict[str, Any]:
        """What `Shards` is told of where files are."""
        tags = [self.stamps[name][1] for name in names]
        paths, origins = map(self.path, names), map(self.origin, names)
        return {"paths": tuple(paths), "origins": tuple(origins), "tags": tuple(tags)}


def is_pattern(root: str) -> bool:
    """Whether a root is a pattern of files and no folder of this name."""
    return any(mark in root for mark in "*?[{") and not os.path.exists(place_of(root))


def matching(pattern: str) -> tuple[str, list[str]]:
    """The folder before a pattern's first wildcard, and the files below it that it names.

    `*`, `?`, `[ab]` and `**` are as in Python's glob, `{a,b}` and `{000..123}` as in a shell. In an
    address a query begins with `?`, so it is no wildcard there.
    Raises `ValueError` for a file that braces alone name and that is not there.
    """
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?[{"))
    base = "/".join(parts[:first]) or "/"
    found: set[str] = set()
    for name in _expanded("/".join(parts[first:])):
        if any(mark in name for mark in "*?["):
            found.update(_glob(base, "", name.split("/")))
        elif is_url(base) or os.path.exists(os.path.join(base, name)):
            found.add(name)
        else:
            raise ValueError(f"data.root: {os.path.join(base, name)} does not exist")
    return base, sorted(found)


def _expanded(text: str) -> list[str]:
    """A text with each of what is in its braces: `a{0..2}` is `a0`, `a1`, `a2`."""
    group = re.search(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}", text)
    if group is None:
        return [text]
    first, _, last = group[1].partition("..")
    chosen = group[1].split(",")
    if last:
        chosen = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    ends = _expanded(text[group.end() :])
    return [text[: group.start()] + each + end for each, end in itertools.product(chosen, ends)]


def _glob(base: str, at: str, parts: list[str]) -> Iterator[str]:
    wanted, *rest = parts
    if wanted == "**":
        yield from _glob(base, at, rest or ["*"])
    with contextlib.suppress(OSError):
        for name, is_folder in entries(os.path.join(base, at)):
            path = f"{at}{name}"
            if name.startswith(".") or not (wanted == "**" or fnmatchcase(name, wanted)):
                continue
            if is_folder and (wanted == "**" or rest):
                yield from _glob(base, f"{path}/", parts if wanted == "**" else rest)
            elif not is_folder and wanted != "**" and not rest:
                yield path


def split_of(name: str) -> str:
    """`train`, `val`, another split's name, or nothing: by a file's name, then by its folders.

    A data set's name may stand before it, and a year after it: `imagenet1k-train-0000.tar`,
    `train2017-0000.tar`.
    """
    *folders, file = name.split("/")
    stem = NUMBER.sub("", os.path.splitext(file)[0])
    for word in (stem, *reversed(folders)):
        last = re.sub(r"\d{4}$", "", re.split(r"[-_.]", word.lower())[-1])
        if last in TRAIN:
            return "train"
        if last in VAL:
            return "val"
        if LIKE_A_SPLIT.search(word.lower()):
            return word
    return ""
