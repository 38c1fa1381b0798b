"""Images that a text or CSV file lists: a path per line, or a path and a class."""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.datasets.base import Dataset, Definition, absolute, root_of
from ddp_ssl.data.datasets.scan import looks_like_image
from ddp_ssl.data.datasets.split import Names, Split

if TYPE_CHECKING:
    from ddp_ssl.config import Data

logger = logging.getLogger("ddp_ssl")

ACCEPTED = "accepted: a path per line, or path,label (CSV: quote what has a comma in it)"
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", " ": "space"}
SAMPLE = 50  # lines by which the form of a list is recognised
UNLABELLED = ("", "-1")
NUMBER = re.compile(r"\s*(?:[-+]?[0-9]+(?:\.[0-9]*)?)?\s*")  # one of several labels


class Form(NamedTuple):
    """The character between the columns of a list, and whether its first line is a header."""

    separator: str = ","
    header: bool = False


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
    numbers, else as text. An image with an empty label or -1 is unlabelled.
    """
    base = absolute(data.root) if data.root else file.parent
    form = recognised(key, file, base)
    names, labels, hashes, outside = Names(), array("q"), array("q"), False
    number = dict.fromkeys(UNLABELLED, -1)
    for name in () if classes is None else classes:
        number[name] = len(number) - len(UNLABELLED)
    for at, path, label in rows(key, file, form):
        if label not in number:
            if classes is not None:
                raise ValueError(
                    f"{key}: {file}, line {at}: {label!r} is a class that data.files does not "
                    f"have; accepted: its {len(classes)} classes"
                )
            number[label] = len(number) - len(UNLABELLED)
        names.append(path.encode("utf-8", "surrogateescape"))
        labels.append(number[label])
        hashes.append(hash(path))
        outside |= path.startswith("/")
    if not len(names):
        raise ValueError(f"{key}: {file} lists no images; {ACCEPTED}")
    repeated = int(np.count_nonzero(np.diff(np.sort(np.frombuffer(hashes, np.int64))) == 0))
    if repeated:
        check_repeated(key, file, form)
    if outside:
        base, names = Path("/"), below_root(names, base)
    ids = np.frombuffer(labels, np.int64).copy()
    if classes is None:
        found = number.keys() - set(UNLABELLED)
        whole = all(name.isascii() and name.isdigit() for name in found)
        classes = tuple(sorted(found, key=lambda name: (int(name) if whole else 0, name)))
        # The last entry is for the label -1.
        rank = np.full(len(classes) + 1, -1)
        for place, name in enumerate(classes):
            rank[number[name]] = place
        ids = rank[ids]
    tell(key, file, form, len(classes), ids, repeated)
    more = len(next(iter(_sample(file, form.separator)))[1]) - 2
    if more > 0:
        logger.info(
            "%s: %s: %d columns of labels: pretraining needs none, k-NN and the probe do without",
            *(key, file, more + 1),
        )
    return Split.of_files(str(base), names, ids), classes


def tell(
    key: str, file: Path, form: Form, classes: int, labels: NDArray[np.int64], repeated: int
) -> None:
    """Say in one line how a list was understood."""
    unlabelled = int(np.count_nonzero(labels < 0))
    parts = [f"{classes} classes" if classes else "no classes", f"{len(labels)} images"]
    parts += [f"{unlabelled} of them unlabelled"] if classes and unlabelled else []
    parts += ["header skipped"] if form.header else []
    parts += [f"separated by {SEPARATORS[form.separator]}"] if form.separator != "," else []
    parts += [f"{repeated} of the images listed more than once"] if repeated else []
    level = logging.WARNING if repeated else logging.INFO
    logger.log(level, "%s: %s: %s", key, file, ", ".join(parts))


def check_repeated(key: str, file: Path, form: Form) -> None:
    """Raise `ValueError` for an image that is listed with two classes."""
    seen: dict[str, tuple[str, int]] = {}
    for at, path, label in rows(key, file, form):
        known, line = seen.setdefault(path, (label, at))
        if known != label:
            raise ValueError(
                f"{key}: {file}, line {at}: {path!r} has the class {label!r} here and {known!r} in "
                f"line {line}; accepted: one class for each image"
            )


# --- the form of a list --------------------------------------------------------------------------


def recognised(key: str, file: Path, base: Path) -> Form:
    """The form of a list, from its first lines and the images that exist.

    Raises `ValueError` for a list whose first column is no images.
    """
    separator = next((s for s in SEPARATORS if _fits([c for _, c in _sample(file, s)])), ",")
    lines = [(number, cells) for number, cells in _sample(file, separator) if cells[0]]
    if not lines:
        return Form(separator)
    sample = [cells for _, cells in lines]

    def is_image(cells: Sequence[str]) -> bool:
        return looks_like_image(cells[0]) or os.path.isfile(base / cells[0])

    images = [is_image(cells) for cells in sample]
    most = sum(images) * 2 >= len(images) - 1
    # Names in a header are free, but it names no image.
    words = re.split(r"[\s,;|]+", " ".join(sample[0]))
    header = most and not images[0] and not any(map(looks_like_image, words))
    if not (header or (most and images[0])):
        at = images.index(False, 0 if most else min(1, len(images) - 1))
        number, (path, *more) = lines[at]
        swapped = more and looks_like_image(more[0])
        what = "the images are in the second column" if swapped else f"{path!r} is no image"
        raise ValueError(
            f"{key}: {file}, line {number}: {what}; {ACCEPTED}; tabs, semicolons or single spaces "
            "may separate the columns too"
        )
    return Form(separator, header)


def _fits(sample: list[list[str]]) -> bool:
    """Whether all lines are an image and a class; the first one may be a header."""
    body = sample[1:] or sample
    return all(len(cells) == 2 for cells in sample) and all(
        looks_like_image(cells[0]) and not looks_like_image(cells[1]) for cells in body
    ) and bool(sample)  # fmt: skip


def _sample(file: Path, separator: str) -> list[tuple[int, list[str]]]:
    """Number and cells of the first lines; those before the first one that is not CSV."""
    found: list[tuple[int, list[str]]] = []
    with opened(file) as lines, contextlib.suppress(csv.Error):  # `rows` says so
        found.extend(itertools.islice(_cells(lines, separator), SAMPLE))
    return found


def opened(file: Path) -> TextIO:
    # File names are bytes; `surrogateescape` keeps those that are not UTF-8.
    return open(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _cells(lines: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every line that is not empty; raises `csv.Error`."""
    if separator == " ":  # a path may have spaces in it, a class may not
        for number, line in enumerate(lines, 1):
            if line.strip():
                path, _, label = line.rstrip().rpartition(" ")
                yield number, [path.rstrip(), label]
        return
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise csv.Error(f"{reader.line_num}: not CSV ({error})") from None


def rows(key: str, file: Path, form: Form) -> Iterator[tuple[int, str, str]]:
    """Line number, path and label (empty if there is none) of every image."""
    with opened(file) as lines:
        columns = 0
        try:
            for at, row in _cells(lines, form.separator):
                if columns == 0:
                    columns = len(row)
                    if form.header:
                        continue
                several = columns > 2 and all(map(NUMBER.fullmatch, row[1:]))
                if len(row) != columns or (columns > 2 and not several) or not row[0]:
                    what = f"{len(row)} columns" if row[0] else "an empty path"
                    raise ValueError(
                        f"{key}: {file}, line {at}: {what}"
                        + (f", expected {columns}" if columns < 3 and row[0] else "")
                        + f"; {ACCEPTED}"
                    )
                if "\n" in row[0] or "\0" in row[0]:
                    raise ValueError(
                        f"{key}: {file}, line {at}: a path with a line break or a zero byte in "
                        f"it, perhaps from a quote that is not closed; {ACCEPTED}"
                    )
                yield at, row[0], row[1].strip() if columns == 2 else ""
        except csv.Error as error:
            raise ValueError(f"{key}: {file}, line {error}; {ACCEPTED}") from None


def below_root(names: Names, base: Path) -> Names:
    """The same files as paths from `/`, because some are outside of `base`."""
    made, prefix, first = Names(), os.fsencode(os.path.join(base, "")), 0
    for end in names.ends:
        name = bytes(names.block[first:end])
        made.append((name if name.startswith(b"/") else prefix + name).lstrip(b"/"))
        first = end
    return made


DEFINITIONS = {"list": Definition(find, load)}
