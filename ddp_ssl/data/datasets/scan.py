"""The images of a folder and their classes: scanned in parallel, once. numpy only.

On a network file system listing ten thousand folders takes minutes, most of it waiting. So many
threads list folders, and the result of a scan is kept below `cache.cache_folder()`, as arrays that
all processes of a machine map. A kept scan is valid while the folders' modification times are the
same. They change when a file in a folder is added, removed or renamed.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.datasets.cache import cache_folder, write_atomically
from ddp_ssl.data.datasets.split import Names, Split
from ddp_ssl.errors import printable
from ddp_ssl.utils.files import if_readable
from ddp_ssl.utils.once import warn_once
from ddp_ssl.utils.progress import EVERY_S
from ddp_ssl.utils.sealed import checksum, sealed, unsealed
from ddp_ssl.utils.seeds import generator

logger = logging.getLogger("ddp_ssl")

# The formats that DALI decodes on every machine, so without GIF and AVIF.
EXTENSIONS = frozenset(
    (b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".bmp", b".webp", b".tif", b".tiff", b".ppm",
     b".pgm", b".jp2")
)  # fmt: skip
# Of other formats: an image by its name, though not one that is read.
OTHER_EXTENSIONS = frozenset((b".gif", b".avif", b".heic", b".heif", b".jxl", b".svg", b".dcm"))
# Folders that file servers and systems make, with thumbnails or removed files in them.
NO_FOLDERS = frozenset(
    (b"@eadir", b"@recycle", b"#recycle", b"#snapshot", b"$recycle.bin", b"__macosx", b"thumbnails",
     b"thumbs", b"lost+found", b"system volume information")
)  # fmt: skip

THREADS = 32  # they mostly wait
WORTH_SAYING = 2.0  # seconds of a scan
WORTH_KEEPING = 5_000  # images; fewer are scanned again
SAMPLE = 1_000  # files whose size and time are kept
# A folder modified so shortly before its listing may change again within the same tick of the file
# system's clock, and its time would not show it. git calls that racy.
RACY = 2_000_000_000  # nanoseconds
VERSION = 1
SHOWN = 3  # names in a message

Array = NDArray[np.int64]


def images_below(folder: Path, only: Sequence[str] | None = None) -> tuple[Split, tuple[str, ...]]:
    """The images of a folder and the names of its class folders; labels are their indices.

    A folder in it that holds images, at any depth, is a class; the order is by name. Without a
    class the folder is flat and its images are unlabelled. `only` names the class folders to scan.

    Raises `ValueError` (key `data.root`) if a folder cannot be read.
    """
    top = os.path.abspath(folder)
    wanted = None if only is None else sorted(set(only))
    key = hashlib.sha256(repr((VERSION, os.fsencode(top), wanted)).encode()).hexdigest()[:32]
    place = cache_folder() / "manifests" / key  # the name is that of earlier versions
    found, stale = _restore(place, top), None
    if isinstance(found, _Stale):
        if found.reason:
            logger.info("%s has changed since it was last scanned: %s", top, found.reason)
        stale, found = found, None
    if found is None:
        found = _scan_all(top, wanted)
        if len(found.labels) >= WORTH_KEEPING:
            found = _keep(place, top, found, stale) or found
    if found.loose:
        warn_once(
            f"{top}: {found.loose} images lie beside the class folders and are left out, "
            "having no class"
        )
    if said := _passed_over(found):
        odd = found.empty or any(looks_like_image(f"x{name}") for name in found.passed)
        warn_once(f"{top}: {said}", logging.WARNING if odd else logging.INFO)
    split = Split(found.labels, top, found.names, found.spans)
    return (split.known_by(found.digest) if found.digest else split), found.classes


def looks_like_image(name: str) -> bool:
    """Whether a name has the extension of an image, read here or not."""
    extension = os.fsencode(os.path.splitext(name)[1].lower())
    return extension in EXTENSIONS or extension in OTHER_EXTENSIONS


def _passed_over(found: _Scan) -> str:
    """The files and folders that a scan left out, in one line; empty if there are none."""
    parts = []
    files = {name: count for name, count in found.passed.items() if not name.endswith("/")}
    folders = [name for name in found.passed if name.endswith("/")]
    if files:
        most = sorted(files.items(), key=lambda item: -item[1])[:SHOWN]
        kinds = ", ".join(f"{count} {name or 'without one'}" for name, count in most)
        parts.append(f"{sum(files.values())} files passed over by their extension ({kinds})")
    if folders:
        count = sum(found.passed[name] for name in folders)
        names = ", ".join(sorted(folders)[:SHOWN])
        parts.append(f"{count} folders of thumbnails or of the system passed over ({names})")
    if found.empty:
        names = ", ".join(f"{name}/" for name in found.empty[:SHOWN])
        more = ", ..." if len(found.empty) > SHOWN else ""
        parts.append(f"{len(found.empty)} class folders without images ({names}{more})")
    return printable("; ".join(parts))


def scan(folder: bytes, at: bytes = b"") -> Iterator[bytes]:
    """Paths, relative to `folder`, of all images below it, in one order on every machine.

    The order is by name within a folder. Hidden files and folders, other extensions, links that
    lead nowhere and links back up are skipped. `at` is the part to scan, empty or ending in a
    slash.
    """
    for item in _items(os.path.join(folder, at)):
        if item.endswith(b"/"):
            yield from scan(folder, at + item)
        else:
            yield at + item


def entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    """The entries of a folder that are not hidden, by name."""
    try:
        with os.scandir(folder) as found:
            return sorted(
                (entry for entry in found if not entry.name.startswith(b".")), key=lambda e: e.name
            )
    except OSError as error:
        raise _unreadable(folder, error) from None


def _items(folder: bytes, passed: Counter[bytes] | None = None) -> list[bytes]:
    """The images and, with a slash at the end, the folders in a folder, by name.

    `passed` counts all others, by their extension or as folders.
    """
    items = []
    passed = Counter() if passed is None else passed
    try:
        for entry in entries(folder):
            if _there(entry.is_dir):
                if entry.name.lower() in NO_FOLDERS:
                    passed[entry.name + b"/"] += 1
                elif not _leads_up(entry):
                    items.append(entry.name + b"/")
                continue
            extension = os.path.splitext(entry.name)[1].lower()
            if extension not in EXTENSIONS:
                passed[extension] += 1
            elif _there(entry.is_file):
                items.append(entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return items


def _there(is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself leads nowhere
            return False
        raise


def _leads_up(entry: os.DirEntry[bytes]) -> bool:
    """Whether this is a link to a folder above it, which a scan would follow without end.

    Other links on the way count too: of two folders that link to each other, each is seen once in
    the other.
    """
    if not entry.is_symlink():
        return False
    target = os.path.join(os.path.realpath(entry.path), b"")
    at = os.path.dirname(entry.path).rstrip(b"/")
    while at:
        if os.path.join(os.path.realpath(at), b"").startswith(target):
            return True
        at = os.path.dirname(at).rstrip(b"/")
    return False


def _unreadable(folder: bytes, error: OSError) -> ValueError:
    return ValueError(
        f"data.root: {os.fsdecode(folder)} cannot be read: {error.strerror}; accepted: folders "
        "that whoever runs this may list"
    )


# --- the scan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scan:
    """The images of a folder as arrays, and the folders' times, which show changes."""

    labels: Array
    names: NDArray[np.uint8]
    spans: Array
    classes: tuple[str, ...]
    loose: int
    folders: NDArray[np.uint8]
    """Paths of all folders listed, relative to the top, each with a zero byte after it."""
    times: Array
    """When each was modified, in ns; -1 if that cannot be trusted."""
    passed: dict[str, int]
    """Numbers of files left out, by extension, and of folders, by name with a slash."""
    empty: tuple[str, ...]
    """Class folders without images."""
    digest: str = ""


class _Stale(NamedTuple):
    """Why a kept scan is no longer valid (empty: it is damaged), and the token of that scan."""

    reason: str
    token: str


class _Listing(NamedTuple):
    at: bytes
    time: int
    files: bytes  # with a zero byte after each
    folders: list[bytes]
    mixed: list[bytes] | None  # all of them by name, where there are both
    passed: Counter[bytes]  # numbers of others


def _list(top: bytes, at: bytes) -> _Listing:
    """List one folder. Its time is read first, so that a change meanwhile is seen next time."""
    path, now = os.path.join(top, at), time.time_ns()
    try:
        modified = os.stat(path).st_mtime_ns
    except OSError as error:
        raise _unreadable(path, error) from None
    passed: Counter[bytes] = Counter()
    items = _items(path, passed)
    folders = [item for item in items if item.endswith(b"/")]
    files = items if not folders else [item for item in items if not item.endswith(b"/")]
    joined = b"\0".join([*files, b""]) if files else b""
    trusted = modified < now - RACY
    mixed = items if files and folders else None
    return _Listing(at, modified if trusted else -1, joined, folders, mixed, passed)


def _scan_all(top: str, only: Sequence[str] | None) -> _Scan:
    root, start = os.fsencode(top), time.monotonic()
    listings: dict[bytes, _Listing] = {}
    count, said = 0, start
    pending = [b""]
    with ThreadPoolExecutor(THREADS, "ddp_ssl-scan") as pool:
        while pending:  # one level of folders after the other
            below: list[bytes] = []
            known = len(listings) + len(pending)
            for listing in pool.map(functools.partial(_list, root), pending):
                if not listing.at and only is not None:
                    kept = {os.fsencode(name) + b"/" for name in only}
                    listing = listing._replace(folders=[f for f in listing.folders if f in kept])
                listings[listing.at] = listing
                below += [listing.at + name for name in listing.folders]
                count += listing.files.count(0)
                if time.monotonic() - said > EVERY_S:
                    said = time.monotonic()
                    logger.info(
                        "scanning %s: %d of %d folders, %d images, %.0f s",
                        top, len(listings), known + len(below), count,
                        said - start,
                    )  # fmt: skip
            pending = below
    found = _assemble(listings, flat=only is None)
    seconds = time.monotonic() - start
    if seconds > WORTH_SAYING:
        logger.info(
            "scanned %s: %d images in %d folders, %.1f s",
            top, len(found.labels), len(listings), seconds,
        )  # fmt: skip
    return found


def _assemble(listings: dict[bytes, _Listing], flat: bool) -> _Scan:
    """All listings as one scan; `flat` accepts images without a class."""
    names, classes, counts, empty = Names(), [], [], []
    top = listings[b""]
    for folder in top.folders:
        before = len(names)
        _append(names, listings, folder)
        if len(names) > before:
            classes.append(os.fsdecode(folder[:-1]))
            counts.append(len(names) - before)
        else:
            empty.append(os.fsdecode(folder[:-1]))
    passed: Counter[bytes] = Counter()
    for listing in listings.values():
        if listing.passed:
            passed += listing.passed
    loose = top.files.count(0) if classes else 0
    labels: Array = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    if not classes and flat:
        _append(names, listings, b"")
        labels = np.full(len(names), -1, np.int64)
    split = Split.of_files("", names, labels)
    assert split.names is not None
    assert split.spans is not None
    folders = b"".join(at + b"\0" for at in listings)
    return _Scan(
        split.labels,
        split.names,
        split.spans,
        tuple(classes),
        loose,
        np.frombuffer(folders, np.uint8),
        np.array([listing.time for listing in listings.values()], np.int64),
        {os.fsdecode(name): count for name, count in passed.items()},
        tuple(empty),
    )


def _append(names: Names, listings: dict[bytes, _Listing], at: bytes) -> None:
    """The images below folder `at`, in `scan`'s order."""
    listing = listings[at]
    if listing.mixed is not None:
        for item in listing.mixed:
            if item.endswith(b"/"):
                _append(names, listings, at + item)
            else:
                names.append(at + item)
    elif listing.folders:
        for folder in listing.folders:
            _append(names, listings, at + folder)
    elif listing.files:  # the usual case, without a Python object per file
        files = at + listing.files[:-1].replace(b"\0", b"\0" + at) + b"\0"
        zeros = np.flatnonzero(np.frombuffer(files, np.uint8) == 0)
        ends = len(names.block) + zeros - np.arange(len(zeros))
        names.block += files.replace(b"\0", b"")
        names.ends.frombytes(ends.astype(np.int64).tobytes())


# --- kept scans ----------------------------------------------------------------------------------

ARRAYS = ("labels", "names", "spans", "folders", "times", "sample")


def _keep(place: Path, top: str, found: _Scan, stale: _Stale | None) -> _Scan | None:
    """Write a scan and map the written files; None if that cannot be done."""
    split = Split(found.labels, top, found.names, found.spans)

    def write(to: Path) -> None:
        ids = generator("manifest").permutation(len(split))[:SAMPLE]
        arrays = {name: getattr(found, name) for name in ARRAYS if name != "sample"}
        arrays["sample"] = np.column_stack([ids, _sizes_and_times(split, ids)])
        for name, content in arrays.items():
            with (to / f"{name}.npy").open("wb") as file:
                np.save(file, content)
                file.flush()
                os.fsync(file.fileno())
        about = {
            "checksums": {name: checksum(to / f"{name}.npy") for name in arrays},
            "folder": os.fsdecode(top),
            "token": uuid.uuid4().hex,
            "digest": split.digest,
            "classes": found.classes,
            "loose": found.loose,
            "passed": found.passed,
            "empty": found.empty,
        }
        (to / "manifest.json").write_text(sealed(about))

    def outdated() -> bool:
        """Whether no other process has written a newer scan meanwhile."""
        about = _about(place)
        return about is None or (stale is not None and about["token"] == stale.token)

    try:
        write_atomically(place, write, outdated)
    except OSError as error:
        warn_once(
            f"DDP_SSL_CACHE: {cache_folder()} cannot be written ({error.strerror}): folders of "
            "images are scanned again at every start; accepted: a folder to keep what was found in"
        )
        return None
    about = _about(place)
    opened = None if about is None else _open(place, about)
    return opened[0] if opened is not None and opened[0].digest == split.digest else None


def _restore(place: Path, top: str) -> _Scan | _Stale | None:
    """The scan kept at `place`, or why it is no longer valid; None if there is none."""
    if not place.is_dir():
        return None
    about = _about(place)
    opened = None if about is None else _open(place, about)
    if about is None or opened is None:
        logger.warning("%s is damaged or of an earlier version: %s is scanned again", place, top)
        return None if about is None else _Stale("", about["token"])
    kept, sample = opened
    reason = _change(top, kept, sample)
    return kept if reason is None else _Stale(reason, about["token"])


def _about(place: Path) -> dict[str, Any] | None:
    """What a kept scan says of itself; None if it is damaged or of an earlier version."""
    return if_readable(lambda: unsealed((place / "manifest.json").read_text()))


def _open(place: Path, about: dict[str, Any]) -> tuple[_Scan, Array] | None:
    """A kept scan mapped into memory, and its sample of files; None if it is damaged."""
    arrays: dict[str, Any] = {}
    try:
        for name in ARRAYS:
            file = place / f"{name}.npy"
            if checksum(file) != about["checksums"][name]:
                return None
            # `memmap` itself makes every index slower.
            arrays[name] = np.asarray(np.load(file, mmap_mode="r"))
    except OSError:
        return None
    sample = arrays.pop("sample")
    kept = _Scan(
        **arrays,
        classes=tuple(about["classes"]),
        loose=about["loose"],
        passed=about["passed"],
        empty=tuple(about["empty"]),
        digest=about["digest"],
    )
    return kept, sample


def _change(top: str, kept: _Scan, sample: Array) -> str | None:
    """The change in the folder `top` since the scan; None if there is none."""
    paths = kept.folders.tobytes().split(b"\0")[:-1]
    root = os.path.join(os.fsencode(top), b"")
    now = _in_threads(lambda i: _modified(root + paths[i]), len(paths))
    changed = np.flatnonzero(now != kept.times)
    if len(changed):
        racy = np.flatnonzero(kept.times == -1)
        first = os.fsdecode(paths[changed[0]]) or "the folder itself"
        others = f" and {len(changed) - 1} other folders" if len(changed) > 1 else ""
        if len(racy) == len(changed):
            return f"{first}{others} may have changed while it was scanned"
        return f"{first}{others}"
    split = Split(kept.labels, top, kept.names, kept.spans)
    differ = np.flatnonzero((_sizes_and_times(split, sample[:, 0]) != sample[:, 1:]).any(1))
    if len(differ):
        first = split.where(int(sample[differ[0], 0]))
        return f"{len(differ)} of {len(sample)} files looked at were rewritten, such as {first}"
    return None


def _modified(path: bytes) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -2  # gone


def _sizes_and_times(split: Split, ids: Array) -> Array:
    """Size and time in ns of files `ids`, int64 `[m, 2]`; -2 for those that are gone."""

    def look(i: int) -> tuple[int, int]:
        try:
            status = os.stat(split.path(int(ids[i])))
        except OSError:
            return -2, -2
        return status.st_size, status.st_mtime_ns

    return _in_threads(look, len(ids)).reshape(-1, 2)


def _in_threads(look: Callable[[int], Any], count: int) -> Array:
    """`look(i)` for all i < count; each thread takes a part."""
    with ThreadPoolExecutor(THREADS, "ddp_ssl-stat") as pool:
        parts = pool.map(
            lambda ids: [look(int(i)) for i in ids],
            np.array_split(np.arange(count), min(count, THREADS) or 1),
        )
        return np.array([seen for part in parts for seen in part], np.int64)
