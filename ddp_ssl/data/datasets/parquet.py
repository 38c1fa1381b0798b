"""Data sets in parquet files, as Hugging Face's `datasets` writes them.

The place of every image in its file is found once, by reading the files in order, and kept below
`cache.cache_folder()`: each file's part as soon as it is done, then all of them in arrays that the
processes of a machine map. From then on an image is read by its place, as from shards. The key of
what is kept is the names, sizes and times of the files, so a changed file is read again. pyarrow
reads the schema, labels and names, and every place is compared with what pyarrow reads.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.config.schema import SAME_AS
from ddp_ssl.data.datasets import imagenet
from ddp_ssl.data.datasets.base import Dataset, Definition, absolute
from ddp_ssl.data.datasets.cache import cache_folder, locked, write_atomically
from ddp_ssl.data.datasets.folders import LIKE_A_SPLIT, TRAIN, VAL
from ddp_ssl.data.datasets.pages import Page, Place, UnsupportedError, arrow, pages
from ddp_ssl.data.datasets.scan import scan
from ddp_ssl.data.datasets.sealed import checksum, sealed, unsealed
from ddp_ssl.data.datasets.shards import ARRAYS, ORIGIN, open_array
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.datasets.tar import Shards
from ddp_ssl.errors import printable
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
VERSION = 1
THREADS = 4  # files at a time; each has a page in memory
BATCH = 32  # images that pyarrow reads at a time
WORTH_SAYING = 2.0  # seconds of reading
LARGEST = 100_000  # label without a name
CLASSES = {"imagenet": 1000, "imagenet100": 100, "inat21": 10_000}
KEPT = (*ARRAYS, "part")
PLACED = ("shard", "offset", "size", "crc", "part")
EMPTY, DAMAGED = -1, -2  # offsets of images that are not there (`tar.ABSENT`)

Ints = NDArray[np.int64]

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
    return root.is_dir() and bool(_below(root)[1]) and next(scan(os.fsencode(root)), None) is None


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


# --- which columns -------------------------------------------------------------------------------


class Columns(NamedTuple):
    """The columns to read, and the names of the classes if the files have them."""

    image: str
    nested: bool  # in a struct `{bytes, path}`
    named: bool  # with a path
    label: str | None
    classes: tuple[str, ...]

    @property
    def leaf(self) -> str:
        """The path of the column of bytes."""
        return f"{self.image}.bytes" if self.nested else self.image


def columns_of(path: Path, wanted: list[str] | None) -> Columns:
    """The columns of a file; `wanted` are their names if the config gives them.

    Raises `ValueError` where there is no such column or more than one.
    """
    schema = opened(path).schema_arrow
    images = [field.name for field in schema if _holds_images(field.type)]
    numbers = [field.name for field in schema if _is_whole(field.type)]
    features = _features(schema)
    classes = [name for name in numbers if features.get(name, {}).get("_type") == "ClassLabel"]
    image, label = _chosen(path, schema.names, wanted, images, numbers, classes)
    kind = schema.field(image).type
    nested = arrow().types.is_struct(kind)
    named = nested and "path" in [field.name for field in kind]
    names = features.get(label or "", {}).get("names") or ()
    return Columns(image, nested, named, label, tuple(str(name) for name in names))


def _chosen(
    path: Path,
    names: list[str],
    wanted: list[str] | None,
    images: list[str],
    numbers: list[str],
    classes: list[str],
) -> tuple[str, str | None]:
    if wanted:
        for name, accepted, what in zip(
            wanted, (images, numbers), ("images", "whole numbers"), strict=False
        ):
            if name not in accepted:
                raise ValueError(
                    f"data.columns: {name!r} is no column of {what} in {path}; "
                    f"accepted: {', '.join(accepted) or 'none of its columns'}"
                )
        return wanted[0], wanted[1] if len(wanted) > 1 else None
    labels = classes or [name for name in numbers if name == "label"] or numbers
    if not images:
        raise ValueError(
            f"data.root: {path} has no column of images; it has {', '.join(names)}; accepted: a "
            "column of {bytes, path} or of bytes"
        )
    if len(images) > 1 or len(labels) > 1:
        what, found = ("images", images) if len(images) > 1 else ("labels", labels)
        raise ValueError(
            f"data.columns: unset, and {', '.join(found)} of {path} may hold the {what}; accepted: "
            f"data.columns=[{images[0]},{labels[0] if labels else 'LABEL'}], or [{images[0]}] for "
            "no labels"
        )
    return images[0], labels[0] if labels else None


def _holds_images(kind: Any) -> bool:
    types = arrow().types
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_whole(kind: Any) -> bool:
    return bool(arrow().types.is_integer(kind))


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` says of the columns; empty if it says nothing."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in about.items() if isinstance(value, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def opened(path: Path) -> Any:
    """pyarrow's `ParquetFile`; raises `ValueError` if it is damaged."""
    try:
        return arrow("pyarrow.parquet").ParquetFile(
            path, memory_map=True, pre_buffer=False, page_checksum_verification=True
        )
    except (OSError, arrow().ArrowException) as error:
        raise ValueError(
            f"data.root: {path} is damaged or cannot be read: {_first(error)}; fetch it again"
        ) from None


def _first(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0])


# --- the places of the images of a file ----------------------------------------------------------


class Table(NamedTuple):
    """A file's images: arrays of `[m]`, and of the paths a block and their lengths."""

    label: Ints
    offset: Ints
    size: Ints
    crc: NDArray[np.uint32]
    part: NDArray[np.int32]  # [m, 5]
    paths: NDArray[np.uint8]
    lengths: Ints


def read_table(path: Path, columns: Columns, stop: threading.Event) -> Table:
    """Find the images of a file. Those of a damaged part of it get no place.

    Raises `ValueError` for a file that is not read.
    """
    file = opened(path)
    _check_schema(path, columns)
    labels, paths, lengths = [], bytearray(), []
    offset, size, crc, part = [], [], [], []
    for group in range(file.num_row_groups):
        if stop.is_set():
            break
        count = file.metadata.row_group(group).num_rows
        label, texts = _labels_and_paths(file, group, columns, path)
        labels.append(label)
        for text in texts:
            paths += text
            lengths.append(len(text))
        places = _places(file, path, group, columns)
        done = 0
        try:
            for place, value in places:
                offset.append(place.offset)
                size.append(place.size)
                part.append(place.part)
                crc.append(value)
                done += 1
        except UnsupportedError as error:
            raise ValueError(
                f"data.root: {path}: its images have {error}, which is not read; accepted: plain "
                "values as `datasets` and pyarrow write them"
            ) from None
        except (OSError, ValueError, IndexError, KeyError, arrow().ArrowException) as error:
            logger.warning(
                "data.root: %s: %d images in row group %d are damaged: %s",
                *(path, count - done, group, _first(error)),
            )
        for _ in range(count - done):
            offset.append(DAMAGED)
            size.append(0)
            part.append((0, 0, 0, 0, 0))
            crc.append(0)
    return Table(
        np.concatenate(labels) if labels else np.empty(0, np.int64),
        np.array(offset, np.int64),
        np.array(size, np.int64),
        np.array(crc, np.uint32),
        np.array(part, np.int32).reshape(-1, 5),
        np.frombuffer(bytes(paths), np.uint8),
        np.array(lengths, np.int64),
    )


def _check_schema(path: Path, columns: Columns) -> None:
    wanted = [columns.image] if columns.label is None else [columns.image, columns.label]
    here = columns_of(path, wanted)
    if here != columns:
        what = "classes" if here.classes != columns.classes else "columns"
        raise ValueError(f"data.root: {path} has other {what} than the first file to train on")


def _labels_and_paths(
    file: Any, group: int, columns: Columns, path: Path
) -> tuple[Ints, list[bytes]]:
    """The label of each row, -1 for none, and its path, empty for none."""
    pa, count = arrow(), file.metadata.row_group(group).num_rows
    label: Ints = np.full(count, -1, np.int64)
    texts = [b""] * count
    try:
        if columns.label is not None:
            cells = file.read_row_group(group, [columns.label], use_threads=False)[0]
            label = cells.cast(pa.int64()).fill_null(-1).to_numpy()
        if columns.named:
            cells = file.read_row_group(group, [f"{columns.image}.path"], use_threads=False)[0]
            cells = _flat(cells.combine_chunks(), "path").cast(pa.binary())
            texts = [text or b"" for text in cells.to_pylist()]
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"data.root: {path} is damaged, labels or names of row group {group}: "
            f"{_first(error)}; fetch it again"
        ) from None
    label = np.maximum(label, -1)
    if columns.classes and len(label) and label.max() >= len(columns.classes):
        raise ValueError(
            f"data.root: {path} has the label {label.max()}; accepted: 0 to "
            f"{len(columns.classes) - 1}, one of its {len(columns.classes)} classes"
        )
    return label, texts


def _flat(cells: Any, name: str) -> Any:
    """A field of an array of structs; empty where the struct is."""
    names = [field.name for field in cells.type]
    return cells.flatten()[names.index(name)]


def _places(file: Any, path: Path, group: int, columns: Columns) -> Iterator[tuple[Place, int]]:
    """The place and the CRC-32 of each image of a row group; an offset of -1 for an empty cell."""
    schema, about = file.schema, file.metadata.row_group(group)
    leaf = next(i for i in range(len(schema)) if schema.column(i).path == columns.leaf)
    known: dict[bytes, Place] = {}
    page: Page | None = None
    cells, values = 0, iter(list[tuple[memoryview, Place]]())
    with path.open("rb", buffering=1 << 20) as raw:
        found = pages(raw, about.column(leaf), schema.column(leaf).max_definition_level)
        for batch in file.iter_batches(
            BATCH, row_groups=[group], columns=[columns.leaf], use_threads=False
        ):
            column = batch.column(0)
            column = _flat(column, "bytes") if columns.nested else column
            for cell in column:
                while cells == 0:
                    page = next(found, None)
                    if page is None:
                        raise ValueError("it has fewer values than rows")
                    if page.cells == 0:
                        known = {bytes(value): place for value, place in page.places()}
                    cells, values = page.cells, page.places()
                cells -= 1
                if not cell.is_valid:
                    yield Place(EMPTY, 0), 0
                    continue
                value = memoryview(cell.as_buffer()).cast("B")
                assert page is not None
                if page.coded:
                    place = known[bytes(value)]
                else:
                    there, place = next(values, (b"", Place(0, 0)))
                    if there != value:
                        raise ValueError("its pages are not as pyarrow reads them")
                yield place, zlib.crc32(value)


# --- all files -----------------------------------------------------------------------------------


def find(data: Data) -> None:
    """Look for the files, and for the columns of the first one."""
    files = files_of(data)
    columns = columns_of(files.base / files.train[0], data.columns)
    if columns.classes:
        _classes(data, files, columns, 0)
    if data.name in CLASSES and not files.val:
        raise ValueError(
            f"data.root: {files.base} has no parquet files of a validation split; data.name="
            f"{data.name} looks for {WANTED}; data.name=parquet holds images out"
        )


def load(data: Data) -> Dataset:
    """All images of the files to train on and of those for validation."""
    files = files_of(data)
    columns = columns_of(files.base / files.train[0], data.columns)
    words = [f"images in {columns.image!r}", f"labels in {columns.label!r}"]
    used = ", ".join(words if columns.label else [words[0], "no labels"])
    unused = f"; not used: {', '.join(files.unused)}" if files.unused else ""
    warn_once(f"{files.base}: parquet, {used}{unused}", logging.INFO)
    stamps = {name: _stamp(files.base / name) for name in files.train + files.val}
    key = hashlib.sha256(
        repr((VERSION, data.name, columns, files.train, files.val, stamps)).encode()
    ).hexdigest()[:32]
    place = cache_folder() / "parquet" / key
    made = _restore(place, data, files)
    if made is None:
        with locked(place, f"finds the images in {files.base}", logger.info):
            made = _restore(place, data, files)
            if made is None:
                made = _keep(place, data, files, _read_all(data, files, columns, stamps))
    if not len(made.train):
        raise ValueError(f"data.root: {files.base}: its files to train on have no images")
    return made


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
                pool.map(lambda n: _table(files.base / n, columns, stamps[n], stop), names)
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
    expected = CLASSES.get(data.name, made.num_classes)
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


def _table(path: Path, columns: Columns, stamp: tuple[int, int], stop: threading.Event) -> Table:
    """The images of a file, from the cache if they are there."""
    key = hashlib.sha256(repr((VERSION, path.name, columns, stamp)).encode()).hexdigest()[:32]
    kept = cache_folder() / "parquet" / "files" / f"{key}.npz"
    try:
        with np.load(kept, allow_pickle=False) as arrays:  # its own checksums are checked
            return Table(**{name: arrays[name] for name in Table._fields})
    except Exception:  # a damaged archive makes numpy raise anything
        pass
    table = read_table(path, columns, stop)
    if stop.is_set():
        return table
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f".{kept.stem}-{os.getpid()}.npz")
        try:
            np.savez(part, **table._asdict())
            part.rename(kept)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        _say_unwritable(error)
    return table


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


# --- kept places ---------------------------------------------------------------------------------


def _keep(place: Path, data: Data, files: Files, made: Dataset) -> Dataset:
    """Write what was found and map the written arrays; the same data set if that fails."""

    def write(to: Path) -> None:
        about: dict[str, Any] = {"class_names": made.class_names, "splits": {}}
        for name, split in (("train", made.train), ("val", made.val)):
            if split is None:
                continue
            sums = {}
            for key in KEPT:
                with (to / f"{name}-{key}.npy").open("wb") as file:
                    np.save(file, getattr(split.shards if key in PLACED else split, key))
                    file.flush()
                    os.fsync(file.fileno())
                sums[key] = checksum(to / f"{name}-{key}.npy")
            known = {"count": len(split), "digest": split.digest, "named": split.named}
            about["splits"][name] = {**known, "checksums": sums}
        (to / "places.json").write_text(sealed(about))

    try:
        # Whatever is there already could not be read.
        write_atomically(place, write, lambda: True)
    except OSError as error:
        _say_unwritable(error)
        return made
    return _restore(place, data, files) or made


def _restore(place: Path, data: Data, files: Files) -> Dataset | None:
    """What was found before, mapped; None if there is nothing or it is damaged."""
    try:
        about = unsealed((place / "places.json").read_text())
    except (OSError, ValueError):
        return None
    splits: dict[str, Split] = {}
    for name, kept in about["splits"].items():
        try:
            arrays = {
                key: open_array(
                    place / f"{name}-{key}.npy", kept["checksums"][key], key, kept["count"]
                )
                for key in KEPT
            }
        except ValueError:
            logger.warning("%s is damaged: the parquet files are read again", place)
            return None
        own = files.train if name == "train" else files.val
        paths = tuple(str(files.base / file) for file in own)
        where = Shards(paths, **{key: arrays.pop(key) for key in PLACED})
        split = Split(root=_root(data, files, name), shards=where, named=kept["named"], **arrays)
        splits[name] = split.known_by(kept["digest"])
    return _dataset(data, splits["train"], splits.get("val"), tuple(about["class_names"]))


def _say_unwritable(error: OSError) -> None:
    warn_once(
        f"DDP_SSL_CACHE: {cache_folder()} cannot be written ({error.strerror}): parquet files are "
        "read through again at every start; accepted: a folder to keep what was found in"
    )


DEFINITION = Definition(find, load)
DEFINITIONS = {"parquet": DEFINITION}
