"""Images that a text or CSV file lists: a path per line, or a path and a class."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddp_ssl.data.datasets.base import Dataset, Definition, absolute, root_of
from ddp_ssl.data.datasets.split import Names, Split

if TYPE_CHECKING:
    from ddp_ssl.config import Data

ACCEPTED = "accepted: a path per line, or path,label (CSV: quote what has a comma in it)"


def find(data: Data) -> None:
    if not data.files:
        raise ValueError(
            f"data.files: unset; data.name=list looks for a text or CSV file; {ACCEPTED}"
        )
    if data.root:
        root_of(data, "it is the folder that the paths of data.files are relative to")
    for key, name in (("files", data.files), ("val_files", data.val_files)):
        if name and not absolute(name).is_file():
            what = "is a folder" if absolute(name).is_dir() else "does not exist"
            raise ValueError(f"data.{key}: {absolute(name)} {what}; {ACCEPTED}")


def load(data: Data) -> Dataset:
    assert data.files is not None
    train, classes = listed("data.files", absolute(data.files), data)
    val = None
    if data.val_files:
        val, _ = listed("data.val_files", absolute(data.val_files), data, classes)
    return Dataset("list", train, val, classes)


def listed(
    key: str, file: Path, data: Data, classes: tuple[str, ...] | None = None
) -> tuple[Split, tuple[str, ...]]:
    """The images of a list and the names of its classes.

    Given `classes` are kept. Otherwise the classes are sorted: by number if all names are whole
    numbers, else as text. An image with an empty label is unlabelled.
    """
    base = absolute(data.root) if data.root else file.parent
    names, labels, outside = Names(), array("q"), False
    number: dict[str, int] = {"": -1}
    for name in () if classes is None else classes:
        number[name] = len(number) - 1
    for at, path, label in rows(key, file):
        if label not in number:
            if classes is not None:
                raise ValueError(
                    f"{key}: {file}, line {at}: {label!r} is a class that data.files does not "
                    f"have; accepted: its {len(classes)} classes"
                )
            number[label] = len(number) - 1
        names.append(os.fsencode(path))
        labels.append(number[label])
        outside |= path.startswith("/")
    if not len(names):
        raise ValueError(f"{key}: {file} lists no images; {ACCEPTED}")
    if outside:
        base, names = Path("/"), below_root(names, base)
    ids = np.frombuffer(labels, np.int64).copy()
    if classes is None:
        del number[""]
        whole = all(name.isascii() and name.isdigit() for name in number)
        classes = tuple(sorted(number, key=lambda name: (int(name) if whole else 0, name)))
        # The last entry is for the label -1.
        rank = np.full(len(classes) + 1, -1)
        for place, name in enumerate(classes):
            rank[number[name]] = place
        ids = rank[ids]
    return Split.of_files(str(base), names, ids), classes


def rows(key: str, file: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, path and label (empty if there is none) of every line."""
    # File names are bytes; `surrogateescape` keeps those that are not UTF-8.
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        reader = csv.reader(opened, skipinitialspace=True, strict=True)
        columns = 0
        try:
            for row in reader:
                if not row:
                    continue
                if columns == 0:
                    columns = len(row)
                    if [cell.strip().lower() for cell in row] in (["path"], ["path", "label"]):
                        continue
                if len(row) != columns or columns > 2 or not row[0]:
                    what = f"{len(row)} columns" if row[0] else "an empty path"
                    raise ValueError(
                        f"{key}: {file}, line {reader.line_num}: {what}"
                        + (f", expected {columns}" if columns < 3 and row[0] else "")
                        + f"; {ACCEPTED}"
                    )
                if "\n" in row[0] or "\0" in row[0]:
                    raise ValueError(
                        f"{key}: {file}, line {reader.line_num}: a path with a line break or a "
                        f"zero byte in it, perhaps from a quote that is not closed; {ACCEPTED}"
                    )
                yield reader.line_num, row[0], row[1].strip() if columns == 2 else ""
        except csv.Error as error:
            raise ValueError(
                f"{key}: {file}, line {reader.line_num}: not CSV ({error}); {ACCEPTED}"
            ) from None


def below_root(names: Names, base: Path) -> Names:
    """The same files as paths from `/`, because some are outside of `base`."""
    made, prefix, first = Names(), os.fsencode(os.path.join(base, "")), 0
    for end in names.ends:
        name = bytes(names.block[first:end])
        made.append((name if name.startswith(b"/") else prefix + name).lstrip(b"/"))
        first = end
    return made


DEFINITIONS = {"list": Definition(find, load)}
