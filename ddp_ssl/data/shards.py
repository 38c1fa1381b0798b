"""Tar shards read by the project's own order: bytes by offset and size. numpy only.

`ddp-ssl pack-shards` writes a folder of them: `shards.json` last of all, and for `train` and
`val` the tar files, DALI's index of each (`.idx`), and arrays in the order of the original ids, so
that a run on shards sees what it would see on the files. Images stand in the tars under numbers;
their names are in an array, and are never used as paths.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ddp_ssl.data.manifest import Split

FORMAT = 1
ABOUT = "shards.json"
ORIGIN = ".origin"  # in a copy: the folder it is one of
ARRAYS = {"labels": 1, "names": 1, "spans": 2, "shard": 1, "offset": 1, "size": 1}
THREADS = 16
EVERY = 5.0  # seconds between lines of progress
CHUNK = 8 << 20


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
        return self.paths[int(self.shard[i])]

    def read(self, i: int) -> NDArray[np.uint8]:
        """The encoded image `i`, uint8 `[length]`; raises `OSError`. For any number of threads."""
        return self.part(i, 0, int(self.size[i]))

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
        """Tar files, below `url` if they are elsewhere, and DALI's `indices`, always on disk.

        Raises `ValueError` (key `data.root`) if an index is missing.
        """
        indices = [path.removesuffix(".tar") + ".idx" for path in self.paths]
        for missing in [path for path in indices if not os.path.isfile(path)][:1]:
            raise ValueError(
                f"data.root: {missing} is missing, which data.reader=streamed needs; copy it "
                "again, or pack it again with ddp-ssl pack-shards"
            )
        if url is None:
            return {"paths": list(self.paths), "indices": indices}
        names = [os.path.basename(path) for path in self.paths]
        return {"paths": [f"{url.rstrip('/')}/{name}" for name in names], "indices": indices}

    def subset(self, ids: NDArray[np.int64]) -> Shards:
        """The images `ids`; open files are shared."""
        return replace(self, shard=self.shard[ids], offset=self.offset[ids], size=self.size[ids])

    def _open(self, path: str) -> tuple[int, bool]:
        """A descriptor, and whether it is kept open, as it is while there may be more of them."""
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


@dataclass(frozen=True, eq=False)
class ShardSet:
    """A folder of shards: the splits of a data set, and the extensions of its images in them."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split | None
    extensions: tuple[str, ...]


def is_shards(root: Path) -> bool:
    """Whether a folder holds shards, all of them: what says so is written last."""
    return (root / ABOUT).is_file()


def open_shards(root: Path, remote: bool = False) -> ShardSet:
    """The splits of a folder of shards, with the ids and digests of the data that was packed.

    Arrays are mapped, not read. With `remote` the training images' tar files are elsewhere. Raises
    `ValueError` (key `data.root`) where something is missing.
    """
    about = describe(root, remote)
    splits = {name: _open_split(root, name, kept) for name, kept in about["splits"].items()}
    return ShardSet(
        about["name"],
        tuple(about["class_names"]),
        splits["train"],
        splits.get("val"),
        tuple(about["extensions"]),
    )


def describe(root: Path, remote: bool = False) -> dict[str, Any]:
    """What `shards.json` says; raises `ValueError` unless all tar files are there, and whole.

    With `remote` those of the training images are elsewhere and are not looked for.
    """
    again = "copy it again, or pack it again with ddp-ssl pack-shards"
    try:
        about = json.loads((root / ABOUT).read_text())
        if about["format"] != FORMAT:
            raise ValueError(
                f"data.root: {root} holds shards of format {about['format']}; accepted: {FORMAT}, "
                "as this version's ddp-ssl pack-shards writes it"
            )
        tars = [(tar["file"], tar["bytes"]) for s in about["splits"].values() for tar in s["tars"]]
        damaged = "train" not in about["splits"] or not {"name", "class_names", "extensions"} <= {
            *about
        }
        # A name from a file must not lead out of the folder.
        damaged = damaged or any(not re.fullmatch(r"(train|val)-\d+\.tar", t[0]) for t in tars)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        damaged = True
    if damaged:
        raise ValueError(f"data.root: {root / ABOUT} is damaged or cannot be read; {again}")

    if remote:
        tars = [tar for tar in tars if not tar[0].startswith("train-")]
    with ThreadPoolExecutor(THREADS, "ddp_ssl-stat") as pool:
        for (file, expected), there in zip(
            tars, pool.map(lambda tar: _size(root / tar[0]), tars), strict=True
        ):
            if there != expected:
                what = "is missing" if there < 0 else f"has {there} bytes instead of {expected}"
                raise ValueError(f"data.root: {root / file} {what}; {again}")
    return about  # type: ignore[no-any-return]


def _open_split(root: Path, name: str, kept: dict[str, Any]) -> Split:
    from ddp_ssl.data.manifest import Split  # which needs `Shards`

    arrays: dict[str, Any] = {}
    for key, ndim in ARRAYS.items():
        path = root / f"{name}-{key}.npy"
        try:
            mapped = np.load(path, mmap_mode="r")
            fits = mapped.ndim == ndim and (key == "names" or len(mapped) == kept["count"])
        except (OSError, ValueError, EOFError):
            fits = False
        if not fits:
            raise ValueError(
                f"data.root: {path} is missing or damaged; copy it again, or pack the data again "
                "with ddp-ssl pack-shards"
            )
        arrays[key] = np.asarray(mapped)  # `memmap` itself makes every index slower
    paths = tuple(str(root / tar["file"]) for tar in kept["tars"])
    where = Shards(paths, arrays.pop("shard"), arrays.pop("offset"), arrays.pop("size"))
    # Names are told apart by split, as those of files are; a copy's are those of what was copied,
    # so that `data.skip` means the same images on every node.
    try:
        named = (root / ORIGIN).read_text(errors="surrogateescape")
    except OSError:
        named = os.path.abspath(root)
    split = Split(root=os.path.join(named, name), shards=where, **arrays)
    return split.known_by(kept["digest"])


# --- a copy on the node --------------------------------------------------------------------------


def stage(root: Path, to: Path, tell: Callable[[str], None]) -> Path:
    """Copy a folder of shards to node-local disk and return the copy.

    What an earlier call copied is kept, and a complete copy only looked at. Tar files are checked
    against their checksums on the way. `tell` gets a line of progress every few seconds. Of several
    processes on a node one copies and the others wait.

    Raises `ValueError` (keys `data.stage`, `data.root`) if that is not possible.
    """
    about = describe(root)
    stamp = hashlib.sha256((root / ABOUT).read_bytes()).hexdigest()[:12]
    target = to / f"{re.sub(r'[^A-Za-z0-9_-]', '_', about['name'])}-{stamp}"
    if _is_whole(target, root):  # perhaps somebody else's, which may only be read
        return target
    try:
        target.mkdir(parents=True, exist_ok=True)
        with (target / ".lock").open("w") as lock:
            _wait_for(lock.fileno(), target, tell)
            (target / ORIGIN).write_text(os.path.abspath(root), errors="surrogateescape")
            if not _is_whole(target, root):
                _copy_all(root, target, about, tell)
    except OSError as error:
        raise ValueError(
            f"data.stage: {root} cannot be copied to {target}: {error.strerror or error}; "
            "accepted: a folder on a local disk that can be written to"
        ) from None
    return target


def _is_whole(target: Path, root: Path) -> bool:
    """Whether a copy of `root` is there with all that any reader needs."""
    try:
        whole = open_shards(target)
        for split in (whole.train, whole.val):
            if split is not None and split.shards is not None:
                split.shards.stream()
        return (target / ORIGIN).read_text(errors="surrogateescape") == os.path.abspath(root)
    except (OSError, ValueError):
        return False


def _wait_for(lock: int, target: Path, tell: Callable[[str], None]) -> None:
    said = -EVERY
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - said > 6 * EVERY:
                said = time.monotonic()
                tell(f"waiting for another process that copies to {target}")
            time.sleep(0.2)


def _copy_all(root: Path, target: Path, about: dict[str, Any], tell: Callable[[str], None]) -> None:
    sums: dict[str, str | None] = {}
    for name, split in about["splits"].items():
        sums |= {f"{name}-{key}.npy": None for key in ARRAYS}
        for tar in split["tars"]:
            sums |= {tar["file"]: tar["sha256"], tar["file"][:-4] + ".idx": None}
    sizes = {file: (root / file).stat().st_size for file in sums}
    for left in target.glob(".part-*"):  # of a process that was killed
        left.unlink()
    missing = [file for file in sums if _size(target / file) != sizes[file]]
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
            if time.monotonic() - said > EVERY:
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
    """One file, under another name until it is whole."""
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
