"""A copy of a folder of shards on the node's own disk, made once per node."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from ddp_ssl.utils.sealed import checksum

CHUNK = 8 << 20


def stage(root: Path, to: Path, tell: Callable[[str], None]) -> Path:
    """Copy a folder of shards to node-local disk and return the copy.

    Files of an earlier call are kept, and a complete copy is only looked at. Tar files are checked
    against their checksums while they are copied. `tell` gets a progress line every few seconds. Of
    several processes on a node one copies and the others wait. The copy is this user's alone, since
    others may write to such a disk too.

    Raises `ValueError` (keys `data.stage`, `data.root`) if that is not possible.
    """
    about = describe(root)
    stamp = hashlib.sha256((root / ABOUT).read_bytes()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", about["name"])
    target = to / f"{name}-{stamp}-user{_owner()}"
    try:
        to.mkdir(parents=True, exist_ok=True)
        _take_over(to / f"{name}-{stamp}", target)
        with contextlib.suppress(FileExistsError):
            target.mkdir(0o700)
        _own(target)
        if _is_whole(target, root):
            return target
        lock = os.open(target / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(lock):
            _wait_for(lock, target, tell)
            (target / ORIGIN).write_text(os.path.abspath(root), errors="surrogateescape")
            if not _is_whole(target, root):
                _copy_all(root, target, about, tell)
    except OSError as error:
        raise ValueError(
            f"data.stage: {root} cannot be copied to {target}: {error.strerror or error}; "
            "accepted: a folder on a local disk that can be written to"
        ) from None
    return target


_owner = os.geteuid


def _take_over(earlier: Path, target: Path) -> None:
    """Give this user's copy of an earlier version, which had no user in its name, the new one."""
    if not target.exists():
        with contextlib.suppress(OSError, ValueError):
            _own(earlier)
            earlier.chmod(0o700)
            earlier.rename(target)


def _own(target: Path) -> None:
    """Raise `ValueError` for a folder that another user made or may have changed."""
    about = target.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != _owner() or about.st_mode & 0o022:
        raise ValueError(
            f"data.stage: {target} is no folder of this user alone, so its files could be another "
            "user's; accepted: another folder, or the same one without it"
        )


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


def _wait_for(lock: int, target: Path, tell: Callable[[str], None]) -> None:
    said = -EVERY_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - said > 6 * EVERY_S:
                said = time.monotonic()
                tell(f"waiting for another process that copies to {target}")
            time.sleep(0.2)


def _copy_all(root: Path, target: Path, about: dict[str, Any], tell: Callable[[str], None]) -> None:
    sums: dict[str, str | None] = {}
    known: dict[str, int | None] = {}  # CRC-32 of small files
    for name, split in about["splits"].items():
        known |= checked_files(split, name)
        sums |= {tar["file"]: tar["sha256"] for tar in split["tars"]}
    sums |= dict.fromkeys(known)
    sizes = {file: (root / file).stat().st_size for file in sums}
    for left in target.glob(".part-*"):  # of a process that was killed
        left.unlink()
    missing = [
        file
        for file in sums
        if file_size(target / file) != sizes[file]
        or (known.get(file) is not None and checksum(target / file) != known[file])
    ]
    needed, free = sum(sizes[file] for file in missing), shutil.disk_usage(target).free
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
            _copy(root / file, target, sizes[file], sums[file], progress, stop)

    with ThreadPoolExecutor(THREADS, "ddp_ssl-stage") as pool:
        try:
            for _ in pool.map(copy, missing):
                pass
        finally:
            stop.set()
    _copy(root / ABOUT, target, (root / ABOUT).stat().st_size, None, progress, threading.Event())
    if missing and time.monotonic() - start > 1:
        tell(f"copied {needed / 1e9:.1f} GB to {target} in {time.monotonic() - start:.0f} s")


def _copy(
    source: Path,
    target: Path,
    size: int,
    checksum: str | None,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Copy one file, under another name until it is complete."""
    part, content, done = target / f".part-{source.name}", hashlib.sha256(), 0
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
    if done != size or (checksum is not None and content.hexdigest() != checksum):
        part.unlink()
        raise ValueError(
            f"data.root: {source} is damaged (its checksum differs from {ABOUT}'s); "
            "pack it again with ddp-ssl pack-shards"
        )
    part.rename(target / source.name)
