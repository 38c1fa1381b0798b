"""Data sets in parquet files, as Hugging Face's `datasets` writes them.

The place of every image in its file is found once, by reading the files in order (`index.py`), and
kept; from then on an image is read by its place, as from shards. What is kept has the names, sizes
and times of the files as its key, so a changed file is read again.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddp_ssl.config.schema import SAME_AS
from ddp_ssl.data.datasets import imagenet, index
from ddp_ssl.data.datasets.base import Dataset, Definition, absolute
from ddp_ssl.data.datasets.cache import locked
from ddp_ssl.data.datasets.folders import LAYOUT, LIKE_A_SPLIT, TRAIN, VAL
from ddp_ssl.data.datasets.index import Columns, Ints, Table, columns_of
from ddp_ssl.data.datasets.scan import scan
from ddp_ssl.data.datasets.shards import ORIGIN
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.datasets.tar import DAMAGED, Shards
from ddp_ssl.utils.once import warn_once
from ddp_ssl.utils.progress import EVERY_S

if TYPE_CHECKING:
    from ddp_ssl.config import Data

logger = logging.getLogger("ddp_ssl")

NAMED = ("folder", "imagenet", "imagenet100", "inat21")  # data sets that may lie in parquet files
WANTED = (
    "train-*.parquet and validation-*.parquet, or folders of these names, in it or in its data/"
)
NOT_IMAGES = "metadata.parquet"  # what `datasets` calls a table beside image files
# What follows the split in a file's name.
NUMBER = re.compile(r"[-_.]?\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{8,})?$")
THREADS = 4  # files at a time; each has a page in memory
WORTH_SAYING = 2.0  # seconds of reading
LARGEST = 100_000  # label without a name
ARRAYS = ("labels", "names", "spans")  # of a split
PLACES = ("shard", "offset", "size", "crc", "part")  # of its images in the files

# --- which files ---------------------------------------------------------------------------------


class Files(NamedTuple):
    """The files of each split, relative to `base`, and the splits that are not used."""

    base: Path
    train: tuple[str, ...]
    val: tuple[str, ...]
    unused: tuple[str, ...]


def accepts(data: Data) -> bool:
    """Whether the data set that the config names is to be read from parquet files."""
    if data.name == "parquet":
        return True
    if data.name not in NAMED or not data.root:
        return False
    if glob.has_magic(data.root) and not absolute(data.root).exists():
        return data.root.endswith(".parquet")
    root = absolute(data.root)
    # Images in class folders come first: a table of annotations may lie beside them.
    places = [root / name for name in LAYOUT[data.name].train] if data.name in LAYOUT else [root]
    if any(place.is_dir() and next(scan(os.fsencode(place)), None) for place in places):
        return False
    return root.is_dir() and bool(_below(root)[1])


def files_of(data: Data) -> Files:
    """The parquet files in `data.root`; raises `ValueError` unless some are to train on."""
    if not data.root:
        raise ValueError(f"data.root: unset; data.name={data.name} looks for {WANTED}")
    root = absolute(data.root)
    if glob.has_magic(data.root) and not root.exists():
        first = next(i for i, part in enumerate(root.parts) if glob.has_magic(part))
        base = Path(*root.parts[:first])
        found = sorted(
            os.path.relpath(path, base)
            for path in glob.glob(str(root), recursive=True)
            if os.path.isfile(path)
        )
    else:
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise ValueError(f"data.root: {root} {what}; accepted: a folder with {WANTED}")
        base, found = _below(root)
    if not found:
        raise ValueError(f"data.root: {root} has no parquet files; accepted: {WANTED}")
    splits: dict[str, list[str]] = {}
    for name in found:
        splits.setdefault(split_of(name), []).append(name)
    whole = splits.pop("", [])
    train, val = (tuple(splits.pop(name, ())) for name in ("train", "val"))
    if not train and not whole:
        raise ValueError(
            f"data.root: {base} has no parquet files to train on, only of "
            f"{', '.join(sorted([*splits, *(['validation'] if val else [])]))}; accepted: {WANTED}"
        )
    unused = sorted(splits) + ([f"{len(whole)} files of no split"] if train and whole else [])
    return Files(base, train or tuple(whole), val, tuple(unused))


def _below(root: Path) -> tuple[Path, list[str]]:
    """The folder that the files lie in, `root` or one in it, and their names relative to it.

    Raises `ValueError` if they lie in several, as in a data set with several configurations.
    """
    for base in (root, root / "data"):
        if found := _names_in(base):
            return base, found
    try:
        inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError:
        return root, []
    # Not in each of a thousand class folders: configurations are few.
    there = [(path, found) for path in inside[:50] if (found := _names_in(path))]
    if len(there) > 1:
        raise ValueError(
            f"data.root: {root} has parquet files in {', '.join(p.name for p, _ in there[:5])}; "
            "accepted: one of these folders"
        )
    return there[0] if there else (root, [])


def _names_in(base: Path) -> list[str]:
    """Parquet files in a folder and in folders of it that are called like splits."""
    names = []
    try:
        for entry in sorted(os.scandir(base), key=lambda entry: entry.name):
            if _is_table(entry.name) and entry.is_file():
                names.append(entry.name)
            elif LIKE_A_SPLIT.search(entry.name.lower()) and entry.is_dir():
                inside = sorted(name for name in os.listdir(entry.path) if _is_table(name))
                names += [f"{entry.name}/{name}" for name in inside]
    except OSError:  # no folder, or one that may not be read
        return []
    return names


def _is_table(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith(".") and name != NOT_IMAGES


def split_of(name: str) -> str:
    """`train`, `val`, another split's name, or nothing: by a file's name, then by its folders."""
    *folders, file = name.split("/")
    stem = NUMBER.sub("", file.removesuffix(".parquet"))
    for word in (stem, *reversed(folders)):
        if word.lower() in TRAIN:
            return "train"
        if word.lower() in VAL:
            return "val"
        if LIKE_A_SPLIT.search(word.lower()):
            return word
    return ""


# --- all files -----------------------------------------------------------------------------------


def find(data: Data) -> None:
    """Look for the files, and for the columns of the first one."""
    files = files_of(data)
    columns = columns_of(files.base / files.train[0], data.columns)
    if columns.classes:
        _classes(data, files, columns, 0)
    if data.name in LAYOUT and not files.val:
        raise ValueError(
            f"data.root: {files.base} has no parquet files of a validation split; data.name="
            f"{data.name} looks for {WANTED}; data.name=parquet holds images out"
        )


def look(data: Data, sample: int) -> tuple[int, list[bytes]]:
    """The number of rows to train on, by the files' own account, and some encoded images."""
    files = files_of(data)
    first = files.base / files.train[0]
    image = columns_of(first, data.columns).image
    rows = sum(index.opened(files.base / name).metadata.num_rows for name in files.train)
    cells: list[Any] = []
    for batch in index.opened(first).iter_batches(sample, columns=[image]):
        cells = batch.column(0).to_pylist()
        break
    found = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
    return rows, [content for content in found if content]


def load(data: Data) -> Dataset:
    """All images of the files to train on and of those for validation."""
    files = files_of(data)
    columns = columns_of(files.base / files.train[0], data.columns)
    words = [f"images in {columns.image!r}", f"labels in {columns.label!r}"]
    used = ", ".join(words if columns.label else [words[0], "no labels"])
    unused = f"; not used: {', '.join(files.unused)}" if files.unused else ""
    warn_once(f"{files.base}: parquet, {used}{unused}", logging.INFO)
    stamps = {name: _stamp(files.base / name) for name in files.train + files.val}
    place = index.place_of(data.name, columns, files.train, files.val, stamps)
    made = _restore(place, data, files)
    if made is None:
        with locked(place, f"finds the images in {files.base}", logger.info):
            made = _restore(place, data, files)
            if made is None:
                made = _read_all(data, files, columns, stamps)
                if not any(map(_damaged, (made.train, made.val))):
                    _keep(place, made)
    if not len(made.train):
        raise ValueError(f"data.root: {files.base}: its files to train on have no images")
    if made.train.shards is not None and (made.train.shards.offset < 0).all():
        why = "are damaged"
        if not _damaged(made.train):
            why = f"have no bytes in {columns.image!r}" + (", only paths" if columns.named else "")
        raise ValueError(
            f"data.root: {files.base}: all {len(made.train)} images to train on {why}; accepted: "
            "files that hold the images' bytes, as the hub has them"
        )
    return made


def _damaged(split: Split | None) -> bool:
    return split is not None and split.shards is not None and DAMAGED in split.shards.offset


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"data.root: {path} cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _read_all(
    data: Data, files: Files, columns: Columns, stamps: dict[str, tuple[int, int]]
) -> Dataset:
    """Find the images of all files; files that were done before are not read again."""
    names, stop = files.train + files.val, threading.Event()
    total = sum(stamps[name][0] for name in names)
    start = said = time.monotonic()
    done, tables = 0, []
    with ThreadPoolExecutor(THREADS, "ddp_ssl-parquet") as pool:
        try:
            for at, table in enumerate(
                pool.map(lambda n: index.table_of(files.base, n, columns, stamps[n], stop), names)
            ):
                tables.append(table)
                done += stamps[names[at]][0]
                if time.monotonic() - said > EVERY_S:
                    said = time.monotonic()
                    rate = done / (said - start)
                    logger.info(
                        "finding the images in %s, once: %d of %d files, %.1f of %.1f GB, %.0f "
                        "MB/s, %.0f s left",
                        *(files.base, at + 1, len(names), done / 1e9, total / 1e9, rate / 1e6),
                        (total - done) / rate,
                    )
        finally:
            stop.set()
    largest = max((int(table.label.max(initial=-1)) for table in tables), default=-1)
    classes = _classes(data, files, columns, largest)
    made = [
        _split(data, files, split, own, some, classes)
        for split, own, some in (
            ("train", files.train, tables[: len(files.train)]),
            ("val", files.val, tables[len(files.train) :]),
        )
    ]
    if time.monotonic() - start > WORTH_SAYING:
        logger.info(
            "found %d images in %d parquet files (%.1f GB) of %s, %.1f s",
            *(sum(map(len, made)), len(names), total / 1e9, files.base, time.monotonic() - start),
        )
    return _dataset(data, made[0], made[1], classes[0])


def _dataset(data: Data, train: Split, val: Split | None, classes: tuple[str, ...]) -> Dataset:
    name = SAME_AS.get(data.name, data.name)
    made = Dataset(name, train, val if val is not None and len(val) else None, classes)
    expected = LAYOUT[data.name].classes if data.name in LAYOUT else made.num_classes
    if made.num_classes != expected:
        logger.warning(
            "%s: %d classes in %s, where the whole data set has %d",
            *(data.name, made.num_classes, data.root, expected),
        )
    if (np.diff(train.labels) < 0).any():
        warn_once(
            f"{data.root}: the images are in the files' own order, not by class as in folders: a "
            "run begun on class folders cannot go on with them",
            logging.INFO,
        )
    odd = train.shards is not None and train.shards.part is not None and train.shards.part[:, 0]
    if np.any(odd) and np.max(odd) > 1:
        warn_once(
            f"{data.root}: compressed with another codec than snappy, so that a whole page is read "
            "for each image, which is slow; ddp-ssl pack-shards makes shards of them"
        )
    return made


def _classes(
    data: Data, files: Files, columns: Columns, largest: int
) -> tuple[tuple[str, ...], Ints]:
    """The names of the classes, and the number of each label: -1 for an image to leave out."""
    if data.name in imagenet.NAMES:
        return imagenet.classes_of(data.name, columns.classes, largest, str(files.base))
    if not columns.classes and largest >= LARGEST:
        raise ValueError(
            f"data.columns: {columns.label!r} has numbers up to {largest} and no names of classes; "
            f"accepted: labels below {LARGEST}, or data.columns=[{columns.image}] for no labels"
        )
    names = columns.classes or tuple(str(number) for number in range(largest + 1))
    return names, np.arange(len(names))


def _split(
    data: Data,
    files: Files,
    split: str,
    own: tuple[str, ...],
    tables: list[Table],
    classes: tuple[tuple[str, ...], Ints],
) -> Split:
    """The images of some files, as one split."""
    names, number = classes
    counts = [len(table.label) for table in tables]
    arrays = {
        key: np.concatenate([getattr(table, key) for table in tables])
        for key in ("label", "offset", "size", "crc", "part", "lengths")
    } if tables else {}  # fmt: skip
    if not arrays:
        return Split.of_files(files.base.name, [], np.empty(0, np.int64))
    old = arrays["label"]
    labels = np.where(old < 0, -1, number[np.maximum(old, 0)]) if len(number) else old
    shard = np.repeat(np.arange(len(own), dtype=np.int32), counts)
    rows = np.concatenate([np.arange(count) for count in counts])
    paths = b"".join(table.paths.tobytes() for table in tables)
    ends = np.cumsum(arrays["lengths"])
    kept = np.flatnonzero((labels >= 0) | (old < 0))
    named: list[bytes] = []
    for i in kept.tolist():
        path = paths[ends[i] - arrays["lengths"][i] : ends[i]]
        if not path:
            named = []
            break
        named.append(_name(path, names[labels[i]] if labels[i] >= 0 else ""))
    unique = len(named) == len(kept) and len(set(named)) == len(named)
    if not unique:  # some data sets call all of them image.jpg
        files_and_rows = zip(shard[kept].tolist(), rows[kept].tolist(), strict=True)
        named = [os.fsencode(f"{own[file]}/{row}") for file, row in files_and_rows]
    where = Shards(
        tuple(str(files.base / name) for name in own),
        shard[kept],
        *(arrays[key][kept] for key in ("offset", "size", "crc", "part")),
    )
    made = Split.of_files(_root(data, files, split), named, labels[kept])
    return replace(made, shards=where, named=unique)


def _name(path: bytes, label: str) -> bytes:
    """An image's name as it would be in class folders, where that can be known."""
    name = path.lstrip(b"/")
    if not label or b"/" in name:
        return name
    if imagenet.is_wnid(label):  # the hub's ImageNet has the WNID at the end of the name as well
        stem, extension = os.path.splitext(name)
        name = stem.removesuffix(b"_" + label.encode()) + extension
    return os.fsencode(label.replace("/", "_")) + b"/" + name


def _root(data: Data, files: Files, split: str) -> str:
    """The folder that names are relative to; a copy has that of the original."""
    root = files.base if glob.has_magic(data.root or "") else absolute(data.root or "")
    try:
        named = (root / ORIGIN).read_text(errors="surrogateescape")
    except OSError:
        named = str(root)
    return os.path.join(named, split)


# --- what is kept --------------------------------------------------------------------------------


def _keep(place: Path, made: Dataset) -> None:
    arrays: dict[str, Any] = {"classes": json.dumps(made.class_names)}
    for name, split in (("train", made.train), ("val", made.val)):
        if split is not None:
            for key in (*ARRAYS, *PLACES):
                arrays[f"{name}-{key}"] = getattr(split.shards if key in PLACES else split, key)
            arrays[f"{name}-about"] = json.dumps([split.named, split.digest])
    index.keep(place, arrays)


def _restore(place: Path, data: Data, files: Files) -> Dataset | None:
    """What was found before; None if there is nothing or it is damaged.

    It is in memory: a mapped file that is damaged under a run would end it.
    """
    arrays = index.kept(place)
    if arrays is None:
        return None
    splits: dict[str, Split] = {}
    for name, own in (("train", files.train), ("val", files.val)):
        if f"{name}-about" in arrays:
            named, digest = json.loads(str(arrays[f"{name}-about"]))
            paths = tuple(str(files.base / file) for file in own)
            where = Shards(paths, **{key: arrays[f"{name}-{key}"] for key in PLACES})
            found = {key: arrays[f"{name}-{key}"] for key in ARRAYS}
            split = Split(root=_root(data, files, name), shards=where, named=named, **found)
            splits[name] = split.known_by(digest)
    classes = tuple(json.loads(str(arrays["classes"])))
    return _dataset(data, splits["train"], splits.get("val"), classes)


DEFINITION = Definition(find, load)
DEFINITIONS = {"parquet": DEFINITION}
