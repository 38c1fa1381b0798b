"""Data sets in tar files that others packed, as WebDataset reads them.

Members with the same path up to the first dot of the file name, the key, belong together:
`c0/17.jpg`, `c0/17.cls` and `c0/17.json`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets import remote
from ddp_ssl.data.datasets.containers import Container, Table
from ddp_ssl.data.datasets.files import BUFFER, Files, open_file, retried
from ddp_ssl.data.datasets.members import DamagedError, Member, members
from ddp_ssl.data.datasets.remote import StoreError
from ddp_ssl.data.datasets.scan import EXTENSIONS
from ddp_ssl.errors import printable, refused
from ddp_ssl.utils.files import if_readable
from ddp_ssl.utils.once import warn_once

if TYPE_CHECKING:
    from ddp_ssl.config import Data

logger = logging.getLogger("ddp_ssl")

PATH = re.compile(rb"(?:\./)?((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # key and extension
NUMBER = re.compile(r"[-+]?\d{1,18}")
LABELS = ("label", "class", "cls", "target", "class_name")  # keys of JSON that may be meant
LOOKED_AT = 300  # members that are looked at first
COUNTED = 10_000  # images after which the number of all is estimated; fewer in a store
SHORT = 1 << 14  # bytes read at a time where few are wanted
LARGEST = 64 << 20  # bytes of a member that holds a label
REPEATED = 64  # bytes of a label that may be that of many images, as a class is and a JSON is not
CLASSES = "classnames.txt"  # of CLIP benchmark's data sets: a class a line


class Members(NamedTuple):
    """Of which members the images and labels are made, by extension."""

    image: str
    """One extension or several: `jpg;png`."""
    label: str | None
    """An extension, or `json.KEY`."""
    classes: tuple[str, ...]
    any: bool
    """Any image is taken, because the config names no extension."""

    def takes(self, extension: str) -> bool:
        """Whether a member is the image."""
        return is_image(extension) if self.any else extension in self.image.split(";")


class WebDataset(Container[Members]):
    """Tar files."""

    name, suffix, what = "webdataset", ".tar", "tar files"
    compressed = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

    @property
    def wanted(self) -> str:
        return super().wanted + " (no .tar.gz: no image of it can be read alone)"

    def choose(self, data: Data, files: Files) -> Members:
        for name in files.train:
            path = files.path(name)
            seen = retried(path, functools.partial(_first, path))
            image = _image(path, seen, data.columns)
            if image:
                label = _label(path, seen, image, data.columns)
                return Members(image, label, _classes(files), data.columns is None)
        there = ", ".join(sorted({f".{extension}" for _, extension, _ in seen})) or "nothing"
        raise ValueError(
            f"data.root: {path} has no images ({there} else); accepted: tar files with members "
            "such as KEY.jpg"
        )

    def read(self, path: str, chosen: Members, stop: threading.Event) -> Table:
        def read() -> Table:
            with _opened(path) as file:
                return _table(file, path, chosen, stop)

        return retried(path, read)

    def look(self, data: Data, sample: int) -> tuple[int, list[bytes]]:
        files = self.stamped(data)
        chosen, found = self.choose(data, files), list[bytes]()
        images = walked = 0
        counted = sample if is_url(files.base) else COUNTED
        for path in map(files.path, files.train):
            with _opened(path, SHORT) as file:
                for member in members(file):
                    if chosen.takes(parts_of(member)[1]):
                        images += 1
                        if len(found) < sample:
                            found.append(file.read(member.size))
                    if images == counted:
                        break
                walked += member.at if images == counted else file.seek(0, 2)
            if images == counted:
                break
        total = sum(files.stamps[name][0] for name in files.train)
        return round(images * total / walked), found


def is_image(extension: str) -> bool:
    """Whether an extension such as `jpg` or `left.png` is that of an image."""
    return os.fsencode(os.path.splitext(f"x.{extension}")[1]) in EXTENSIONS


def parts_of(member: Member) -> tuple[bytes, str]:
    """Key and extension of a member, in lower case; no extension where it is none of a sample."""
    found = PATH.fullmatch(member.name) if member.is_file else None
    if found is None:
        return b"", ""
    return found[1], os.fsdecode(found[2].lower())


@contextlib.contextmanager
def _opened(path: str, buffer: int = BUFFER) -> Iterator[BinaryIO]:
    """An open tar file; raises `ValueError` where it is damaged."""
    try:
        with open_file(path, buffer) as file:
            yield file
    except DamagedError as error:
        raise ValueError(
            f"data.root: {path} {error}; accepted: tar files that are whole and not compressed"
        ) from None


# --- what is read --------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A member of a sample, and its content if it is small."""

    key: bytes
    extension: str
    content: bytes


def _first(path: str) -> list[Seen]:
    """The first members of a file."""
    found = []
    with _opened(path, SHORT) as file:
        for member in islice(members(file), LOOKED_AT):
            key, extension = parts_of(member)
            if extension:
                content = b"" if is_image(extension) else file.read(min(member.size, BUFFER))
                found.append(Seen(key, extension, content))
    return found


def _image(path: str, seen: list[Seen], wanted: list[str] | None) -> str:
    """The extensions of images, none where there are none."""
    there = sorted({member.extension for member in seen})
    if wanted:
        chosen = wanted[0].lower()
        if seen and not set(chosen.split(";")) & set(there):
            raise ValueError(
                f"data.columns: {wanted[0]!r} is the extension of no member of {path}; accepted: "
                f"{', '.join(there)}"
            )
        return chosen if seen else ""
    images = [member for member in seen if is_image(member.extension)]
    counts = Counter(key for key, _ in {(member.key, member.extension) for member in images})
    for member in images:
        if counts[member.key] > 1:
            _refuse_several(path, member.key, {m.extension for m in images if m.key == member.key})
    return ";".join(sorted({member.extension for member in images}))


def _refuse_several(path: str, key: bytes, extensions: set[str]) -> None:
    found = sorted(extensions)
    raise ValueError(
        f"data.columns: {', '.join(found)} of {os.fsdecode(key)} in {path} may be the image; "
        f"accepted: data.columns=[{found[0]},cls], or [{found[0]}] for no labels"
    )


def _label(path: str, seen: list[Seen], image: str, wanted: list[str] | None) -> str | None:
    """Where labels are: an extension, or `json.KEY`; None for no labels."""
    kinds = {member.extension for member in seen}
    keys = _keys_of_json(seen)
    if wanted:
        if len(wanted) == 1:
            return None
        label = wanted[1]
        texts = [member.content for member in seen if member.extension == _extension(label)]
        found = [if_readable(functools.partial(_value, text, label)) for text in texts]
        if found.count(-1) == len(found) or label == "json":
            accepted = sorted(kinds & {"cls", "txt"}) + [f"json.{key}" for key in keys]
            raise ValueError(
                f"data.columns: {label!r} holds no labels in {path}; accepted: "
                f"{', '.join(accepted) or 'no labels'}"
            )
        return label
    if "cls" in kinds:
        return "cls"
    texts = [member.content for member in seen if member.extension == "txt"]
    if texts and all(NUMBER.fullmatch(text.decode(errors="replace").strip()) for text in texts):
        return "txt"
    may = [f"json.{key}" for key in LABELS if key in keys]
    if texts:
        warn_once(
            f"data.columns: unset, and the texts in .txt are taken for captions, which are no "
            f"labels; data.columns=[{image},{(may or ['txt'])[0]}] takes labels from there",
            logging.INFO,
        )
    elif may:
        warn_once(
            f"data.columns: unset, so the images have no labels; data.columns=[{image},{may[0]}] "
            "takes those of .json",
            logging.INFO,
        )
    return None


def _extension(label: str) -> str:
    """The extension of the members that hold labels."""
    return "json" if label.startswith("json.") else label


def _keys_of_json(seen: list[Seen]) -> list[str]:
    """The keys of the first JSON that may be labels."""
    contents = (member.content for member in seen if member.extension == "json")
    found = if_readable(lambda: json.loads(next(contents)).items())
    return sorted(key for key, value in found or () if _may_be_label(value))


def _may_be_label(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _classes(files: Files) -> tuple[str, ...]:
    """The names of the classes by number, where a file beside the tar files has them."""
    place = files.origin(CLASSES)
    try:
        if not remote.exists(place):
            return ()
    except StoreError as error:  # S3's answer for no such file to who may not list the bucket
        if f"{place}: 403 " not in str(error):
            raise
        return ()
    with refused(f"data.root: {place} cannot be read", "accepted: a class a line, or no such file"):
        lines = remote.content(place).decode(errors="replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


# --- the images of a file ------------------------------------------------------------------------


class Image(NamedTuple):
    """An image's name and place."""

    name: bytes
    extension: str
    offset: int
    size: int
    crc: int


def _table(file: BinaryIO, path: str, chosen: Members, stop: threading.Event) -> Table:
    """The images of an open file, which is read once."""
    images: dict[bytes, Image] = {}
    labels: dict[bytes, int | str] = {}
    notes = Counter[str]()
    of_label = _extension(chosen.label or "")
    for member in members(file):
        if stop.is_set():
            break
        key, extension = parts_of(member)
        if member.is_link:
            notes["links"] += 1
        elif not extension:
            continue
        elif extension == of_label:
            what = f"data.columns: {chosen.label!r} of {os.fsdecode(member.name)} in {path}"
            if member.size > LARGEST:
                raise ValueError(f"{what}: {member.size} bytes; accepted: at most {LARGEST}")
            content = file.read(member.size)
            value = _known_value if member.size <= REPEATED else _value
            with refused(what):
                labels[key] = value(content, chosen.label or "")
        elif chosen.takes(extension):
            if key in images:
                if images[key].extension != extension:
                    _refuse_several(path, key, {images[key].extension, extension})
                notes["members that are there twice, all but the last"] += 1
            crc = _checksum(file, member)
            name = member.name.removeprefix(b"./")
            images[key] = Image(name, extension, member.at, member.size, crc)
    notes.update("labels without an image" for _ in labels.keys() - images.keys())
    found = list(images.values())
    label, classes = _numbered([labels.get(key, -1) for key in images], path, chosen)
    return Table(
        label,
        np.array([image.offset for image in found], np.int64),
        np.array([image.size for image in found], np.int64),
        np.array([image.crc for image in found], np.uint32),
        np.frombuffer(b"".join(image.name for image in found), np.uint8),
        np.array([len(image.name) for image in found], np.int64),
        classes,
        np.array([*notes.keys()], np.str_),
        np.array([*notes.values()], np.int64),
    )


def _checksum(file: BinaryIO, member: Member) -> int:
    """CRC-32 of a member's content, which is read."""
    crc, left = 0, member.size
    while left:
        content = file.read(min(left, BUFFER))
        if not content:
            raise DamagedError("became shorter while it was read")
        crc = zlib.crc32(content, crc)
        left -= len(content)
    return crc


def _value(content: bytes, label: str) -> int | str:
    """A label: a number, -1 for none, or a name. May raise anything."""
    if label.startswith("json."):
        value: Any = json.loads(content)
        for key in label.split(".")[1:]:
            value = value.get(key)
            if value is None:
                return -1
        if not _may_be_label(value):
            raise ValueError(f"{value!r} is neither a whole number nor a name")
        text = str(value)
    else:
        text = content.decode()
    text = printable(text.strip())
    return max(int(text), -1) if NUMBER.fullmatch(text) else text or -1


_known_value = functools.lru_cache(1 << 11)(_value)


def _numbered(
    values: list[int | str], path: str, chosen: Members
) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
    """The labels as numbers, and the names that they count if they are names."""
    names = sorted({value for value in values if isinstance(value, str)})
    number = {name: i for i, name in enumerate(names)}
    if names:
        for value in values:
            if isinstance(value, int) and value >= 0:
                raise ValueError(
                    f"data.columns: {chosen.label!r} has both names and numbers in {path}, such as "
                    f"{names[0]!r} and {value}; accepted: one of the two, or data.columns=["
                    f"{chosen.image}] for no labels"
                )
    counted = [number[value] if isinstance(value, str) else value for value in values]
    return np.array(counted, np.int64), np.array(names, np.str_)


CONTAINER = WebDataset()
DEFINITIONS = {CONTAINER.name: CONTAINER.definition}
