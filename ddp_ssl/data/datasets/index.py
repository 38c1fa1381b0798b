"""The images of a parquet file, found by reading it in order.

pyarrow reads the schema, labels and names. `pages` says where each image lies, which is compared
with what pyarrow reads.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.datasets.containers import Table
from ddp_ssl.data.datasets.files import BUFFER, RETRIES, open_file
from ddp_ssl.data.datasets.pages import Page, Place, UnsupportedError, arrow, pages
from ddp_ssl.data.datasets.remote import StoreError
from ddp_ssl.data.datasets.tar import DAMAGED, EMPTY
from ddp_ssl.errors import printable
from ddp_ssl.utils.files import if_readable
from ddp_ssl.utils.once import warn_once

logger = logging.getLogger("ddp_ssl")

BATCH = 32  # images that pyarrow reads at a time
LABELS = ("labels", "class")  # columns of labels, after `label`; other numbers may be anything

Ints = NDArray[np.int64]

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


def columns_of(path: str, wanted: list[str] | None) -> Columns:
    """The columns of a file; `wanted` are their names if the config gives them.

    Raises `ValueError` where there is no such column or more than one.
    """
    file = opened(path)
    schema = file.schema_arrow
    images = [field.name for field in schema if _holds_images(field.type)]
    numbers = [field.name for field in schema if _is_whole(field.type)]
    features = _features(schema)
    classes = [name for name in numbers if features.get(name, {}).get("_type") == "ClassLabel"]
    image, label = _chosen(path, schema.names, wanted, images, numbers, classes)
    kind = schema.field(image).type
    if label is None and numbers and not wanted:
        warn_once(
            f"data.columns: unset, so the images have no labels: {', '.join(numbers)} of the "
            f"parquet files may be no classes; data.columns=[{image},{numbers[0]}] takes it"
        )
    nested = arrow().types.is_struct(kind)
    named = nested and "path" in [field.name for field in kind]
    names = features.get(label or "", {}).get("names") or ()
    found = Columns(image, nested, named, label, tuple(str(name) for name in names))
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    for name in (found.leaf, label):
        if leaves.count(name) > 1:  # a column's name has a dot
            raise ValueError(
                f"data.columns: {path} has both a column {name!r} and a field of this name in a "
                "struct, which is not supported; accepted: files with one of them"
            )
    return found


def _chosen(
    path: str,
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
    labels = classes or [name for name in numbers if name == "label"]
    labels = labels or [name for name in numbers if name in LABELS]
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
    kinds = [kind]
    if types.is_struct(kind):
        kinds = [field.type for field in kind if field.name == "bytes"]
    return any(types.is_binary(leaf) or types.is_large_binary(leaf) for leaf in kinds)


def _is_whole(kind: Any) -> bool:
    return bool(arrow().types.is_integer(kind))


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` says of the columns; empty if it says nothing."""
    about = if_readable(
        lambda: json.loads(schema.metadata[b"huggingface"])["info"]["features"].items()
    )
    return {name: value for name, value in about or () if isinstance(value, dict)}


def opened(path: str) -> Any:
    """pyarrow's `ParquetFile`; raises `ValueError` if it is damaged or cannot be read."""
    for pause in (*RETRIES, None):
        try:
            # Not mapped: reading a mapped file that was cut meanwhile would end the process.
            return arrow("pyarrow.parquet").ParquetFile(
                open_file(path), memory_map=False, buffer_size=BUFFER, pre_buffer=False,
                page_checksum_verification=True,
            )  # fmt: skip
        except (OSError, arrow().ArrowException) as error:
            if not _may_pass(error):
                raise ValueError(
                    f"data.root: {path} is damaged or cannot be read: {_first(error)}; fetch it "
                    "again"
                ) from None
            _wait(path, error, pause)
    raise AssertionError


def _may_pass(error: BaseException) -> bool:
    """Whether it is the file system's error: pyarrow's own about a damaged file has no number."""
    return isinstance(error, OSError | StoreError) and getattr(error, "errno", 0) is not None


def _wait(path: str, error: BaseException, pause: float | None) -> None:
    """Wait before the next attempt; raises `ValueError` if there is none."""
    if pause is None or isinstance(error, FileNotFoundError | PermissionError):
        raise ValueError(f"data.root: {path} cannot be read: {_first(error)}") from None
    time.sleep(pause)


def _first(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0])


# --- the places of the images of a file ----------------------------------------------------------


def read_table(path: str, columns: Columns, stop: threading.Event) -> Table:
    """Find the images of a file. Those of a damaged part of it get no place.

    Raises `ValueError` for a file that is not read, and where the file system does not give it.
    """
    file = opened(path)
    _check_schema(path, columns)
    labels, paths, lengths = [], bytearray(), []
    offset, size, crc, part = [], [], [], []
    for group in range(file.num_row_groups):
        if stop.is_set():
            break
        for pause in (*RETRIES, None):
            try:
                label, texts = _labels_and_paths(file, group, columns, path)
                places = _places_of(file, path, group, columns)
                break
            except OSError as error:
                _wait(path, error, pause)
                file = opened(path)  # a stale one stays so
        labels.append(label)
        for text in texts:
            paths += text
            lengths.append(len(text))
        for place, value in places:
            offset.append(place.offset)
            size.append(place.size)
            part.append(place.part)
            crc.append(value)
    return Table(
        np.concatenate(labels) if labels else np.empty(0, np.int64),
        np.array(offset, np.int64),
        np.array(size, np.int64),
        np.array(crc, np.uint32),
        np.frombuffer(bytes(paths), np.uint8),
        np.array(lengths, np.int64),
        part=np.array(part, np.int32).reshape(-1, 5),
    )


def _check_schema(path: str, columns: Columns) -> None:
    wanted = [columns.image] if columns.label is None else [columns.image, columns.label]
    here = columns_of(path, wanted)
    if here != columns:
        what = "classes" if here.classes != columns.classes else "columns"
        raise ValueError(f"data.root: {path} has other {what} than the first file to train on")


def _places_of(file: Any, path: str, group: int, columns: Columns) -> list[tuple[Place, int]]:
    """Those of `_places`, `DAMAGED` from a damaged part on; raises the file system's `OSError`."""
    count = file.metadata.row_group(group).num_rows
    found: list[tuple[Place, int]] = []
    try:
        found.extend(_places(file, path, group, columns))
    except UnsupportedError as error:
        raise ValueError(
            f"data.root: {path}: its images have {error}, which is not read; accepted: plain "
            "values as `datasets` and pyarrow write them"
        ) from None
    except Exception as error:  # damaged bytes raise anything
        if _may_pass(error):
            raise
        logger.warning(
            "data.root: %s: %d images in row group %d are damaged: %s",
            *(path, count - len(found), group, _first(error)),
        )
    return found + [(Place(DAMAGED, 0), 0)] * (count - len(found))


def _labels_and_paths(
    file: Any, group: int, columns: Columns, path: str
) -> tuple[Ints, list[bytes]]:
    """The label of each row, -1 for none, and its path, empty for none."""
    pa, count = arrow(), file.metadata.row_group(group).num_rows
    label: Ints = np.full(count, -1, np.int64)
    texts = [b""] * count
    try:
        if columns.label is not None:
            cells = file.read_row_group(group, [columns.label], use_threads=False)[0]
            label = _numbers(cells, columns.label, path)
        if columns.named:
            cells = file.read_row_group(group, [f"{columns.image}.path"], use_threads=False)[0]
            cells = _flat(cells.combine_chunks(), "path").cast(pa.binary())
            texts = [text or b"" for text in cells.to_pylist()]
    except (OSError, pa.ArrowException) as error:
        if _may_pass(error):
            raise
        raise ValueError(
            f"data.root: {path} is damaged, labels or names of row group {group}: "
            f"{_first(error)}; fetch it again"
        ) from None
    label = np.maximum(label, -1)
    return label, texts


def _numbers(cells: Any, name: str, path: str) -> Ints:
    """Labels as int64, -1 for none."""
    pa = arrow()
    try:
        label: Ints = cells.cast(pa.int64()).fill_null(-1).to_numpy()
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"data.columns: {name!r} of {path} has numbers that are not supported as labels "
            f"({_first(error)}); accepted: whole numbers up to 2^63 - 1"
        ) from None
    return label


def _flat(cells: Any, name: str) -> Any:
    """A field of an array of structs; empty where the struct is."""
    names = [field.name for field in cells.type]
    return cells.flatten()[names.index(name)]


def _places(file: Any, path: str, group: int, columns: Columns) -> Iterator[tuple[Place, int]]:
    """The place and the CRC-32 of each image of a row group; an offset of -1 for an empty cell."""
    schema, about = file.schema, file.metadata.row_group(group)
    leaf = next(i for i in range(len(schema)) if schema.column(i).path == columns.leaf)
    known: dict[bytes, Place] = {}
    page: Page | None = None
    cells, values = 0, iter(list[tuple[memoryview, Place]]())
    with open_file(path) as raw:
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
                value: bytes = cell.as_py()
                assert page is not None
                if page.coded:
                    place = known[value]
                else:
                    there, place = next(values, (memoryview(b""), Place(0, 0)))
                    if bytes(there) != value:  # memoryviews compare one number after the other
                        raise ValueError("its pages are not as pyarrow reads them")
                yield place, zlib.crc32(value)
