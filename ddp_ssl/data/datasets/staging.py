"""A copy of shards or of parquet files on the node's own disk, made once per node."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ddp_ssl.data.datasets.cache import wait_for
from ddp_ssl.data.datasets.sealed import checksum
from ddp_ssl.data.datasets.shards import (
    ABOUT,
    ORIGIN,
    THREADS,
    checked_files,
    describe,
    file_size,
    open_shards,
)
from ddp_ssl.utils.progress import EVERY_S

CHUNK = 8 << 20


def stage(root: Path, to: Path, tell: Callable[[str], None]) -> Path:
    """Copy a folder of shards to node-local disk and return the copy.

    Files of an earlier call are kept, and a complete copy is only looked at. Tar files are checked
    against their checksums while they are copied. `tell` gets a progress line every few seconds. Of
    several processes on a node one copies and the others wait.

    Raises `ValueError` (keys `data.stage`, `data.root`) if that is not possible.
    """
    about = describe(root)
    stamp = hashlib.sha256((root / ABOUT).read_bytes()).hexdigest()[:12]
    target = to / f"{re.sub(r'[^A-Za-z0-9_-]', '_', about['name'])}-{stamp}"

    def copy() -> None:
        known: dict[str, int | None] = {}  # CRC-32 of small files
        sums: dict[str, str | None] = {}
        for name, split in about["splits"].items():
            known |= checked_files(split, name)
            sums |= {tar["file"]: tar["sha256"] for tar in split["tars"]}
        sums |= dict.fromkeys(known)
        sizes = {file: (root / file).stat().st_size for file in sums}
        missing = [
            file
            for file in sums
            if file_size(target / file) != sizes[file]
            or (known.get(file) is not None and checksum(target / file) != known[file])
        ]
        _copy_all(root, target, {file: (sizes[file], sums[file]) for file in missing}, tell)
        _copy_all(root, target, {ABOUT: ((root / ABOUT).stat().st_size, None)}, lambda _: None)

    return _once(root, target, lambda: _is_whole(target, root), copy, tell)


def stage_files(
    root: Path,
    base: Path,
    names: Sequence[str],
    data: str,
    to: Path,
    tell: Callable[[str], None],
) -> Path:
    """The same for files below `base`, of the data set `data` in `root`.

    A file of the copy is known by its size and time.
    """

    def stamp(file: Path) -> tuple[int, int]:
        try:
            return file.stat().st_size, file.stat().st_mtime_ns
        except OSError:
            return -1, -1

    stamps = {name: stamp(base / name) for name in names}
    target = to / f"{data}-{hashlib.sha256(repr((str(root), stamps)).encode()).hexdigest()[:12]}"

    def missing() -> list[str]:
        return [name for name in names if stamp(target / name) != stamps[name]]

    def copy() -> None:
        _copy_all(base, target, {name: (stamps[name][0], None) for name in missing()}, tell)

    return _once(root, target, lambda: (target / ORIGIN).exists() and not missing(), copy, tell)


def _once(
    root: Path,
    target: Path,
    is_whole: Callable[[], bool],
    copy: Callable[[], None],
    tell: Callable[[str], None],
) -> Path:
    """The folder `target`, after one process of this node has made it whole."""
    if is_whole():  # it may belong to another user and be read-only
        return target
    try:
        target.mkdir(parents=True, exist_ok=True)
        with (target / ".lock").open("w") as lock:
            wait_for(lock.fileno(), f"copies to {target}", tell)
            (target / ORIGIN).write_text(os.path.abspath(root), errors="surrogateescape")
            if not is_whole():
                copy()
    except OSError as error:
        raise ValueError(
            f"data.stage: {root} cannot be copied to {target}: {error.strerror or error}; "
            "accepted: a folder on a local disk that can be written to"
        ) from None
    return target


def _is_whole(target: Path, root: Path) -> bool:
    """Whether `target` is a copy of `root` with all files that a reader needs."""
    try:
        whole = open_shards(target)
        for split in (whole.train, whole.val):
            if split is not None and split.shards is not None:
                split.shards.stream()
        return (target / ORIGIN).read_text(errors="surrogateescape") == os.path.abspath(root)
    except (OSError, ValueError):
        return False


def _copy_all(
    root: Path,
    target: Path,
    files: dict[str, tuple[int, str | None]],
    tell: Callable[[str], None],
) -> None:
    """Copy `files`: the size of each, and its SHA-256 if that is known."""
    for left in target.glob(".part-*"):  # of a process that was killed
        left.unlink()
    needed, free = sum(size for size, _ in files.values()), shutil.disk_usage(target).free
    if needed > free:
        raise ValueError(
            f"data.stage: {target.parent} has {free / 1e9:.1f} GB free, {root} needs "
            f"{needed / 1e9:.1f} GB; accepted: a folder with that much room, or no data.stage"
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

    def copy(file: str) -> None:
        if not stop.is_set():
            _copy(root / file, target / file, target, *files[file], progress, stop)

    with ThreadPoolExecutor(THREADS, "ddp_ssl-stage") as pool:
        try:
            for _ in pool.map(copy, files):
                pass
        finally:
            stop.set()
    if files and time.monotonic() - start > 1:
        tell(f"copied {needed / 1e9:.1f} GB to {target} in {time.monotonic() - start:.0f} s")


def _copy(
    source: Path,
    to: Path,
    target: Path,
    size: int,
    checksum: str | None,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Copy one file, under another name until it is complete."""
    name = "-".join(to.relative_to(target).parts)
    part, content, done = target / f".part-{name}", hashlib.sha256(), 0
    with source.open("rb", buffering=0) as read, part.open("wb", buffering=0) as write:
        while chunk := read.read(CHUNK):
            if stop.is_set():
                return
            if checksum is not None:
                content.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[write.write(view) :]
            done += len(chunk)
            progress(len(chunk))
        os.fsync(write.fileno())
    if checksum is None and done != size:
        part.unlink()
        raise ValueError(f"data.root: {source} has {done} instead of {size} bytes; call again")
    if done != size or (checksum is not None and content.hexdigest() != checksum):
        part.unlink()
        raise ValueError(
            f"data.root: {source} is damaged (its checksum differs from {ABOUT}'s); "
            "pack it again with ddp-ssl pack-shards"
        )
    status = source.stat()
    os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))
    to.parent.mkdir(parents=True, exist_ok=True)
    part.rename(to)
