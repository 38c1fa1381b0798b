"""A copy of shards, parquet or tar files, or of the first of them, on the node's own disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import stat
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets import remote
from ddp_ssl.data.datasets.cache import wait_for
from ddp_ssl.data.datasets.remote import Stamp, joined
from ddp_ssl.data.datasets.shards import (
    ABOUT,
    ORIGIN,
    checked_files,
    describe,
    file_size,
    origin_of,
)
from ddp_ssl.utils.files import if_readable
from ddp_ssl.utils.progress import EVERY_S
from ddp_ssl.utils.sealed import checksum, sha256_at
from ddp_ssl.utils.waits import heed


class File(NamedTuple):
    """A file's size, its SHA-256 if that is known, else its stamp's tag."""

    size: int
    sha256: str | None = None
    tag: str | None = None


THREADS = 16


def stage(root: str | Path, to: Path, tell: Callable[[str], None], gb: float | None = None) -> Path:
    """Copy a folder of shards to node-local disk and return the copy.

    With `gb` only the first tar files, as many as that takes; a reader finds the others in `root`.
    Files of an earlier call are kept, and a complete copy is only looked at. Tar files are checked
    against their checksums while they are copied. `tell` gets a progress line every few seconds. Of
    several processes on a node one copies and the others wait. The copy is this user's alone, since
    others may write to such a disk too.

    Raises `ValueError` (keys `data.stage`, `data.root`) if that is not possible.
    """
    root, about = str(root), describe(root)
    text = remote.content(joined(root, ABOUT))
    name = re.sub(r"[^A-Za-z0-9_-]", "_", about["name"])
    target = _place(to, f"{name}-{hashlib.sha256(text).hexdigest()[:12]}")
    known: dict[str, int | None] = {}  # CRC-32 of small files
    tars: dict[str, File] = {}
    for name, split in about["splits"].items():
        known |= checked_files(split, name)
        tars |= {tar["file"]: File(tar["bytes"], tar["sha256"]) for tar in split["tars"]}
    sizes = remote.stamps([joined(root, file) for file in known])
    files: dict[str, File]
    files = {file: File(-1 if s is None else s[0]) for file, s in zip(known, sizes, strict=True)}
    files |= _first(tars, gb)

    def missing() -> list[str]:
        return [
            file
            for file, about in files.items()
            if file_size(target / file) != about.size
            or (known.get(file) is not None and checksum(target / file) != known[file])
        ]

    def is_whole() -> bool:
        same = if_readable(lambda: (target / ABOUT).read_bytes()) == text
        return same and origin_of(str(target)) == root and not missing()

    def copy() -> None:
        _copy_all(root, target, {file: files[file] for file in missing()}, tell)
        _copy_all(root, target, {ABOUT: File(len(text))}, lambda _: None)

    return _once(root, target, is_whole, copy, tell)


def _first(files: Mapping[str, File], gb: float | None) -> dict[str, File]:
    """The first files, in their order, as many as fit into `gb`; all of them without it."""
    ends = itertools.accumulate(file.size for file in files.values())
    fits = [gb is None or end <= gb * 1e9 for end in ends]
    return dict(itertools.compress(files.items(), fits))


def stage_files(
    root: str,
    base: str,
    stamps: Mapping[str, Stamp],
    data: str,
    to: Path,
    tell: Callable[[str], None],
    gb: float | None = None,
) -> Path:
    """The same for files below `base`, with their `stamps`, of the data set `data` in `root`.

    A file of the copy is known by its size and its time. There are no checksums of the original, so
    each copy is read back and compared with what was read, and its SHA-256 is kept beside it.
    """
    key = hashlib.sha256(repr((root, dict(stamps))).encode()).hexdigest()[:12]
    target = _place(to, f"{data}-{key}")
    files = _first({name: File(size, tag=tag) for name, (size, tag) in stamps.items()}, gb)

    def missing() -> dict[str, File]:
        there = copies(target, base, {name: stamps[name] for name in files})
        return {name: file for name, file in files.items() if name not in there}

    def copy() -> None:
        _copy_all(base, target, missing(), tell)

    return _once(root, target, lambda: (target / ORIGIN).exists() and not missing(), copy, tell)


def copies(target: Path, base: str, stamps: Mapping[str, Stamp]) -> dict[str, str]:
    """The paths of the files in a copy that have the sizes and times of those below `base`."""
    there = remote.stamps([str(target / name) for name in stamps])
    far = is_url(base)
    return {
        name: str(target / name)
        for (name, (size, tag)), stamp in zip(stamps.items(), there, strict=True)
        if stamp == (size, str(_time_of(tag)) if far else tag)
    }


def _time_of(tag: str) -> int:
    """The time, in nanoseconds, of a copy of what a store has under this tag."""
    return (zlib.crc32(tag.encode()) >> 1) * 10**9


def is_sound(path: str) -> bool:
    """Whether a file of a copy has the SHA-256 of what was copied; reads all of it."""
    copy = Path(path)
    return if_readable(lambda: sha256_at(copy) == _sum_of(copy).read_text()) is True


def _sum_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _once(
    root: str,
    target: Path,
    is_whole: Callable[[], bool],
    copy: Callable[[], None],
    tell: Callable[[str], None],
) -> Path:
    """The folder `target`, after one process of this node has made it whole."""
    try:
        _take(target)
        if is_whole():
            return target
        lock = os.open(target / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(lock):
            wait_for(lock, f"copies to {target}", tell)
            (target / ORIGIN).write_text(root, errors="surrogateescape")
            if not is_whole():
                copy()
    except OSError as error:
        raise ValueError(
            f"data.stage: {root} cannot be copied to {target}: {error.strerror or error}; "
            "accepted: a folder on a local disk that can be written to"
        ) from None
    return target


def _place(to: Path, name: str) -> Path:
    return to / f"{name}-user{os.geteuid()}"


def _take(target: Path) -> None:
    """Make the folder of a copy, or rename this user's of a version without users in the name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        with contextlib.suppress(OSError, ValueError):
            earlier = target.with_name(target.name.rpartition("-")[0])
            _own(earlier)
            earlier.chmod(0o700)
            earlier.rename(target)
    with contextlib.suppress(FileExistsError):
        target.mkdir(0o700)
    _own(target)


def _own(target: Path) -> None:
    """Raise `ValueError` for a folder that another user made or may have changed."""
    about = target.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise ValueError(
            f"data.stage: {target} is no folder of this user alone, so its files could be another "
            "user's; accepted: another folder, or the same one without it"
        )


def _copy_all(
    root: str,
    target: Path,
    files: dict[str, File],
    tell: Callable[[str], None],
) -> None:
    """Copy `files`."""
    for left in target.glob(".part-*"):  # of a process that was killed
        left.unlink()
    needed, free = sum(file.size for file in files.values()), shutil.disk_usage(target).free
    if needed > free:
        raise ValueError(
            f"data.stage: {target.parent} has {free / 1e9:.1f} GB free, {root} needs "
            f"{needed / 1e9:.1f} GB; accepted: a folder with that much room, data.stage_gb for the "
            "first files alone, or no data.stage"
        )
    start = said = time.monotonic()
    copied, guard, stop = 0, threading.Lock(), threading.Event()

    def progress(count: int) -> None:
        nonlocal copied, said
        with guard:
            copied += count
            if time.monotonic() - said > EVERY_S:
                said = time.monotonic()
                rate = copied / (said - start)
                tell(
                    f"copying {root} to {target}: {copied / 1e9:.1f} of {needed / 1e9:.1f} GB, "
                    f"{rate / 1e6:.0f} MB/s, {(needed - copied) / rate:.0f} s left"
                )

    def copy(number: int, file: str) -> None:
        part = target / f".part-{number}"  # `a-b` and `a/b` may both be there
        if not stop.is_set():
            _copy(joined(root, file), target / file, part, files[file], progress, stop)

    with ThreadPoolExecutor(THREADS, "ddp_ssl-stage", heed, (stop,)) as pool:
        try:
            for _ in pool.map(copy, range(len(files)), files):
                pass
        finally:
            stop.set()
    if files and time.monotonic() - start > 1:
        tell(f"copied {needed / 1e9:.1f} GB to {target} in {time.monotonic() - start:.0f} s")


def _copy(
    source: str,
    to: Path,
    part: Path,
    about: File,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Copy one file, under another name until it is complete.

    Without a known checksum the copy is read back and compared with what was read of the source.
    """
    (size, checksum, tag), content, done = about, hashlib.sha256(), 0
    with part.open("wb", buffering=0) as write:
        for chunk in remote.chunks(source, size, tag):
            if stop.is_set():
                return
            content.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[write.write(view) :]
            done += len(chunk)
            progress(len(chunk))
        os.fsync(write.fileno())
        os.posix_fadvise(write.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that a disk is read
    if checksum is None and done != size:
        part.unlink()
        raise ValueError(f"data.root: {source} has {done} instead of {size} bytes; call again")
    if done != size or (checksum is not None and content.hexdigest() != checksum):
        part.unlink()
        raise ValueError(
            f"data.root: {source} is damaged (its checksum differs from {ABOUT}'s); "
            "pack it again with ddp-ssl pack-shards"
        )
    if checksum is None and sha256_at(part) != content.hexdigest():
        part.unlink()
        raise ValueError(
            f"data.stage: the copy of {source} in {to.parent} does not read back as written: "
            "is the disk failing? accepted: a folder on another disk"
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    if not is_url(source):
        os.utime(part, ns=(os.stat(source).st_atime_ns, os.stat(source).st_mtime_ns))
    elif tag is not None:
        os.utime(part, ns=(_time_of(tag), _time_of(tag)))
    if tag is not None:
        _sum_of(to).write_text(content.hexdigest())
    part.rename(to)
