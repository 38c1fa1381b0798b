"""Data sets in files of many images, as others wrote them: what the kinds of such files share.

A `Container` says what is read of each file (`choose`), and finds the images of one file (`read`)
by reading it once, in order. All else stands here: which files belong to which split, the names of
the classes, and what is kept. From then on an image is read by its place, as from shards. What is
kept has the names, sizes and times of the files as its key, so a changed file is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.config.schema import SAME_AS
from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets import imagenet, remote, staging
from ddp_ssl.data.datasets.base import Dataset, Definition
from ddp_ssl.data.datasets.cache import cache_folder, keep, kept, locked
from ddp_ssl.data.datasets.files import (
    Files,
    entries,
    holds_images,
    is_pattern,
    matching,
    root_of,
    split_of,
)
from ddp_ssl.data.datasets.folders import LAYOUT, LIKE_A_SPLIT
from ddp_ssl.data.datasets.shards import origin_of
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.datasets.tar import DAMAGED, Shards
from ddp_ssl.errors import BuildError
from ddp_ssl.utils.once import warn_once
from ddp_ssl.utils.progress import EVERY_S
from ddp_ssl.utils.text import counted
from ddp_ssl.utils.waits import heed

if TYPE_CHECKING:
    from ddp_ssl.config import Data

logger = logging.getLogger("ddp_ssl")

VERSION = 4  # of what is kept
NAMED = ("folder", "imagenet", "imagenet100", "inat21")  # data sets that may lie in containers
FOLDERS = 50  # of a root that are looked into: configurations are few, classes may be a thousand
THREADS = 4  # files at a time
WORTH_SAYING = 2.0  # seconds of reading
LARGEST = 100_000  # label without a name
ARRAYS = ("labels", "names", "spans")  # of a split
PLACES = ("shard", "offset", "size", "crc", "part")  # of its images in the files

Ints = NDArray[np.int64]

# --- the images of a file ------------------------------------------------------------------------


class Table(NamedTuple):
    """The images of a file: arrays of `[m]`, and of their paths a block and the lengths.

    `label` is -1 for none. Where the file itself has names of classes, it counts in `classes`.
    """

    label: Ints
    offset: Ints
    size: Ints
    crc: NDArray[np.uint32]
    paths: NDArray[np.uint8]
    lengths: Ints
    classes: NDArray[np.str_] = np.empty(0, np.str_)
    notes: NDArray[np.str_] = np.empty(0, np.str_)  # kinds of what else is there and is not read
    noted: Ints = np.empty(0, np.int64)  # how many there are of each kind
    part: NDArray[np.int32] | None = None  # [m, 5], of parquet files


class Chosen(Protocol):
    """What is read of each file: of what the images and labels are made; names of the classes."""

    @property
    def image(self) -> str: ...
    @property
    def label(self) -> str | None: ...
    @property
    def classes(self) -> tuple[str, ...]: ...


C = TypeVar("C", bound=Chosen)


class Container(ABC, Generic[C]):
    """A kind of files that hold images."""

    name: str
    """The value of `data.name`."""
    suffix: str
    """What the files' names end in."""
    what: str
    """What the files are called."""
    compressed: tuple[str, ...] = ()
    """What the names of such files end in if they are compressed, so that they are not read."""

    @abstractmethod
    def choose(self, data: Data, files: Files) -> C:
        """What is to be read of each file; raises `ValueError` where that is not clear. Cheap."""

    @abstractmethod
    def read(self, path: str, chosen: C, stop: threading.Event) -> Table:
        """The images of a file, which is read once. Those of a damaged part of it get no place.

        Raises `ValueError` for a file that is not read, and where the file system does not give it.
        """

    @abstractmethod
    def look(self, data: Data, sample: int) -> tuple[int, list[bytes]]:
        """The number of images to train on, without reading them, and some encoded images."""

    # --- which files ---

    @property
    def wanted(self) -> str:
        """What is looked for, in messages."""
        each = f"train-*{self.suffix} and validation-*{self.suffix}"
        return f"{each}, or folders of these names, in it or in its data/"

    def is_one(self, name: str) -> bool:
        """Whether a file is of this kind, by its name."""
        return name.endswith(self.suffix) and not name.startswith(".")

    def accepts(self, data: Data) -> bool:
        """Whether the data set that the config names is to be read from files of this kind."""
        if data.name == self.name:
            return True
        if data.name not in NAMED or not data.root:
            return False
        if is_pattern(data.root):
            return data.root.endswith(self.suffix)
        root = root_of(data)
        # Images in class folders come first: a table of annotations may lie beside them.
        layout = LAYOUT[data.name].train if data.name in LAYOUT else ("",)
        if any(holds_images(os.path.join(root, name)) for name in layout):
            return False
        return bool(self._below(root)[1])

    def files_of(self, data: Data) -> Files:
        """The files in `data.root`; raises `ValueError` unless some are to train on."""
        if not data.root:
            raise ValueError(f"data.root: unset; data.name={data.name} looks for {self.wanted}")
        root = root_of(data)
        if is_pattern(data.root):
            if is_url(root) and any(mark in root.split("/")[2] for mark in "*?[{"):
                raise ValueError(
                    f"data.root: {root} has a wildcard in its bucket or host; accepted: wildcards "
                    "in the names of folders and files, and data.root=[A, B] for several roots"
                )
            base, found = matching(root)
        else:
            try:
                entries(root)
            except OSError as error:
                what = {
                    FileNotFoundError: "does not exist",
                    NotADirectoryError: "is not a folder",
                }.get(type(error), f"cannot be read: {error.strerror}")
                raise ValueError(
                    f"data.root: {root} {what}; accepted: a folder with {self.wanted}"
                ) from None
            base, found = self._below(root)
        if not found:
            raise ValueError(f"data.root: {root} has no {self.what}; accepted: {self.wanted}")
        splits: dict[str, list[str]] = {}
        for name in found:
            splits.setdefault(split_of(name), []).append(name)
        whole = splits.pop("", [])
        train, val = (tuple(splits.pop(name, ())) for name in ("train", "val"))
        if is_pattern(data.root) and len(splits) == 1 and not (train or whole or val):
            whole = splits.popitem()[1]  # such as train-clean, which the pattern names
        if not train and not whole:
            others = ", ".join(sorted([*splits, *(["validation"] if val else [])]))
            raise ValueError(
                f"data.root: {base} has no {self.what} to train on, only of {others}; accepted: "
                f"{self.wanted}, or a pattern of the files of one split"
            )
        unused = sorted(splits)
        if train and whole:
            unused.append(f"{len(whole)} files of no split")
        return Files(base, train or tuple(whole), val, tuple(unused))

    def _below(self, root: str) -> tuple[str, list[str]]:
        """The folder that the files lie in, `root` or one in it, and their names relative to it.

        Raises `ValueError` if they lie in several, as in a data set with several configurations.
        """
        for base in (root, os.path.join(root, "data")):
            if found := self._names_in(base):
                return base, found
        inside: list[str] = []
        with contextlib.suppress(OSError):
            inside = [e.name for e in entries(root) if e.is_folder and e.name[0] != "."]
        bases = [os.path.join(root, name) for name in inside[:FOLDERS]]
        there = [(base, found) for base in bases if (found := self._names_in(base))]
        if len(there) > 1:
            folders = ", ".join(os.path.basename(base) for base, _ in there[:5])
            raise ValueError(
                f"data.root: {root} has {self.what} in {folders}; accepted: one of these folders"
            )
        return there[0] if there else (root, [])

    def _names_in(self, base: str) -> list[str]:
        """Files of this kind in a folder and in folders of it that are called like splits."""
        there = []
        try:
            for name, is_folder in entries(base):
                if not is_folder:
                    there.append(name)
                elif LIKE_A_SPLIT.search(name.lower()):
                    there += [f"{name}/{file}" for file, _ in entries(os.path.join(base, name))]
        except OSError:  # no folder, or one that may not be read
            return []
        names = [name for name in there if self.is_one(os.path.basename(name))]
        compressed = [name for name in there if self.compressed and name.endswith(self.compressed)]
        if names and compressed:
            warn_once(
                f"data.root: {base}: not read: {counted(len(compressed), 'compressed file')}, such "
                f"as {compressed[0]}; accepted: {self.what} that are not compressed"
            )
        return names

    # --- all files ---

    @property
    def definition(self) -> Definition:
        return Definition(self.find, self.load)

    def find(self, data: Data) -> None:
        """Look for the files, and for what is read of them."""
        files = self.files_of(data)
        chosen = self.choose(data, files)
        if chosen.classes:
            self._classes(data, files, chosen, [])
        if data.name in LAYOUT and not files.val:
            raise ValueError(
                f"data.root: {files.base} has no {self.what} of a validation split; data.name="
                f"{data.name} looks for {self.wanted}; data.name={self.name} holds images out"
            )

    def stamped(self, data: Data) -> Files:
        """The files, with the stamp of each; raises `ValueError` where one is missing."""
        files = self.files_of(data)
        names = files.train + files.val
        stamps = dict(zip(names, remote.stamps([files.origin(n) for n in names]), strict=True))
        for name in (name for name, stamp in stamps.items() if stamp is None):
            raise ValueError(f"data.root: {files.origin(name)} cannot be read: is it there?")
        return files._replace(stamps={name: stamp for name, stamp in stamps.items() if stamp})

    def load(self, data: Data, files: Files | None = None) -> Dataset:
        """All images of the files to train on and of those for validation.

        `files` are `stamped`, and may be read in a copy.
        """
        files = self.stamped(data) if files is None else files
        chosen = self.choose(data, files._replace(copied={}))
        labels = "no labels" if chosen.label is None else f"labels in {chosen.label!r}"
        unused = f"; not used: {', '.join(files.unused)}" if files.unused else ""
        warn_once(
            f"{files.base}: {self.name}, images in {chosen.image!r}, {labels}{unused}", logging.INFO
        )
        place = self._place(data.name, chosen, files.train, files.val, files.stamps)
        made = self._restore(place, data, files)
        if made is None:
            with locked(place, f"finds the images in {files.base}", logger.info):
                made = self._restore(place, data, files)
                if made is None:
                    made = self._read_all(data, files, chosen)
                    if not any(map(damaged, (made.train, made.val))):
                        _keep(place, made)
        if not len(made.train):
            raise ValueError(f"data.root: {files.base}: its files to train on have no images")
        return made

    def _read_all(self, data: Data, files: Files, chosen: C) -> Dataset:
        """Find the images of all files; files that were done before are not read again."""
        names, stop = files.train + files.val, threading.Event()
        total = sum(files.stamps[name][0] for name in names)
        start = said = time.monotonic()
        done, tables = 0, []

        def table_of(name: str) -> Table:
            return self._table_of(files, name, chosen, stop)

        with ThreadPoolExecutor(THREADS, f"ddp_ssl-{self.name}", heed, (stop,)) as pool:
            try:
                for at, table in enumerate(pool.map(table_of, names)):
                    tables.append(table)
                    done += files.stamps[names[at]][0]
                    if time.monotonic() - said > EVERY_S:
                        said = time.monotonic()
                        rate = done / (said - start)
                        logger.info(
                            "finding the images in %s, once: %d of %d files, %.1f of %.1f GB, "
                            "%.0f MB/s, %.0f s left",
                            *(files.base, at + 1, len(names), done / 1e9, total / 1e9, rate / 1e6),
                            (total - done) / rate,
                        )
            finally:
                stop.set()
                remote.forget()
        notes = Counter[str]()
        for table in tables:
            notes.update(dict(zip(table.notes.tolist(), table.noted.tolist(), strict=True)))
        if notes:
            what = ", ".join(f"{note} ({count})" for note, count in sorted(notes.items()))
            warn_once(f"data.root: {files.base}: not read: {what}")
        classes, labels = self._classes(data, files, chosen, tables)
        cut, roots = len(files.train), _root(data, files)
        made = [
            self._split(files, os.path.join(roots, split), own, some, numbered, classes)
            for split, own, some, numbered in (
                ("train", files.train, tables[:cut], labels[:cut]),
                ("val", files.val, tables[cut:], labels[cut:]),
            )
        ]
        if time.monotonic() - start > WORTH_SAYING:
            logger.info(
                "found %d images in %d %s (%.1f GB) of %s, %.1f s",
                *(sum(map(len, made)), len(names), self.what, total / 1e9, files.base),
                time.monotonic() - start,
            )
        return _dataset(data, made[0], made[1], classes)

    def _table_of(self, files: Files, name: str, chosen: C, stop: threading.Event) -> Table:
        """The images of a file with this stamp: as they are kept, or found now and kept.

        They are found in a copy only if its bytes are still those of the original. A table with
        damaged images is not kept, because the damage may be gone at the next start.
        """
        place = self._place(name, chosen, files.stamps[name])
        if (found := kept(place)) is not None:
            return Table(**found)
        sound = name in files.copied and staging.is_sound(files.copied[name])
        table = self.read(files.copied[name] if sound else files.origin(name), chosen, stop)
        if remote.stamps([files.origin(name)]) != [files.stamps[name]]:
            raise BuildError(f"data.root: {files.origin(name)} changed while it was read")
        if not stop.is_set() and DAMAGED not in table.offset:
            keep(place, {k: v for k, v in table._asdict().items() if v is not None})
        return table

    def _classes(
        self, data: Data, files: Files, chosen: C, tables: Sequence[Table]
    ) -> tuple[tuple[str, ...], list[Ints]]:
        """The names of the classes, and each file's labels counted in them.

        -1 is for no label, -2 for an image to leave out.
        """
        labels, names = [table.label for table in tables], chosen.classes
        if not names and any(len(table.classes) for table in tables):
            names, labels = self._merged(files, tables)
        largest = [int(label.max(initial=-1)) for label in labels]
        most = max(largest, default=-1)
        if names and most >= len(names):
            raise ValueError(
                f"data.root: {files.path((files.train + files.val)[largest.index(most)])} has the "
                f"label {most}; accepted: 0 to {len(names) - 1}, one of its {len(names)} classes"
            )
        if data.name in imagenet.NAMES:
            names, number = imagenet.classes_of(data.name, names, most, files.base)
            number = np.append(np.where(number < 0, -2, number), -1)  # the last is for -1
            return names, [number[label] for label in labels]
        if max(most + 1, len(names)) > LARGEST and not chosen.classes:
            what = f"{len(names)} names" if names else f"numbers up to {most} and no names"
            raise ValueError(
                f"data.columns: {chosen.label!r} has {what} of classes; accepted: labels below "
                f"{LARGEST}, or data.columns=[{chosen.image}] for no labels"
            )
        return names or tuple(str(number) for number in range(most + 1)), labels

    def _merged(self, files: Files, tables: Sequence[Table]) -> tuple[tuple[str, ...], list[Ints]]:
        """The names that the files have for their labels, all of them sorted, and the labels."""
        named = [len(table.classes) > 0 for table in tables]
        for name, has_names, table in zip(files.train + files.val, named, tables, strict=True):
            if not has_names and (table.label >= 0).any():
                other = (files.train + files.val)[named.index(True)]
                raise ValueError(
                    f"data.root: {files.path(name)} has numbers as labels, {other} has names such "
                    f"as {str(tables[named.index(True)].classes[0])!r}; accepted: one of the two"
                )
        every = np.unique(np.concatenate([table.classes for table in tables]))
        labels = []
        for table in tables:
            number = np.append(np.searchsorted(every, table.classes), -1)
            labels.append(number[table.label])
        return tuple(every.tolist()), labels

    def _split(
        self,
        files: Files,
        root: str,
        own: tuple[str, ...],
        tables: list[Table],
        labels: list[Ints],
        classes: tuple[str, ...],
    ) -> Split:
        """The images of some files, as one split."""
        if not tables:
            return Split.of_files(root, [], np.empty(0, np.int64))
        keys = ["offset", "size", "crc", "lengths"]
        if tables[0].part is not None:
            keys.append("part")
        arrays = {key: np.concatenate([getattr(table, key) for table in tables]) for key in keys}
        number, counts = np.concatenate(labels), [len(table.label) for table in tables]
        shard = np.repeat(np.arange(len(own), dtype=np.int32), counts)
        rows = np.concatenate([np.arange(count) for count in counts])
        paths = b"".join(table.paths.tobytes() for table in tables)
        ends = np.cumsum(arrays.pop("lengths"))
        starts = np.append(0, ends[:-1])
        used = np.flatnonzero(number >= -1)
        named: list[bytes] = []
        for i in used.tolist():
            path = paths[starts[i] : ends[i]]
            if not path:
                named = []
                break
            named.append(_name(path, classes[number[i]] if number[i] >= 0 else ""))
        unique = len(named) == len(used) and len(set(named)) == len(named)
        if not unique:  # some data sets call all of them image.jpg
            files_and_rows = zip(shard[used].tolist(), rows[used].tolist(), strict=True)
            named = [os.fsencode(f"{own[file]}/{row}") for file, row in files_and_rows]
        made = Split.of_files(root, named, np.maximum(number[used], -1))
        places = {key: array[used] for key, array in arrays.items()}
        where = Shards(shard=shard[used], kind=self.name, **files.places(own), **places)
        return replace(made, shards=where, named=unique)

    # --- what is kept ---

    def _place(self, *key: object) -> Path:
        """Where what depends on `key` is kept."""
        name = hashlib.sha256(repr((VERSION, *key)).encode()).hexdigest()[:32]
        return cache_folder() / self.name / f"{name}.npz"

    def _restore(self, place: Path, data: Data, files: Files) -> Dataset | None:
        """What was found before; None if there is nothing or it is damaged.

        It is in memory: a mapped file that is damaged under a run would end it.
        """
        arrays = kept(place)
        if arrays is None:
            return None
        splits: dict[str, Split] = {}
        for name, own in (("train", files.train), ("val", files.val)):
            if f"{name}-about" in arrays:
                named, digest = json.loads(str(arrays[f"{name}-about"]))
                places: dict[str, Any] = {
                    key: arrays[f"{name}-{key}"] for key in PLACES if f"{name}-{key}" in arrays
                }
                where = Shards(kind=self.name, **files.places(own), **places)
                found = {key: arrays[f"{name}-{key}"] for key in ARRAYS}
                root = os.path.join(_root(data, files), name)
                split = Split(root=root, shards=where, named=named, **found)
                splits[name] = split.known_by(digest)
        classes = tuple(json.loads(str(arrays["classes"])))
        return _dataset(data, splits["train"], splits.get("val"), classes)


def damaged(split: Split | None) -> bool:
    """Whether a part of a split's files was damaged when its images were looked for."""
    return split is not None and split.shards is not None and DAMAGED in split.shards.offset


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
    return made


def _name(path: bytes, label: str) -> bytes:
    """An image's name as it would be in class folders, where that can be known."""
    name = path.lstrip(b"/")
    if not label or b"/" in name:
        return name
    if imagenet.is_wnid(label):  # the hub's ImageNet has the WNID at the end of the name as well
        stem, extension = os.path.splitext(name)
        name = stem.removesuffix(b"_" + label.encode()) + extension
    return os.fsencode(label.replace("/", "_")) + b"/" + name


def _root(data: Data, files: Files) -> str:
    """The folder that names are relative to; a copy has that of the original."""
    root = files.base if is_pattern(data.root or "") else root_of(data)
    return origin_of(root) or root


def _keep(place: Path, made: Dataset) -> None:
    arrays: dict[str, Any] = {"classes": json.dumps(made.class_names)}
    for name, split in (("train", made.train), ("val", made.val)):
        if split is not None:
            for key in (*ARRAYS, *PLACES):
                array = getattr(split.shards if key in PLACES else split, key)
                if array is not None:
                    arrays[f"{name}-{key}"] = array
            arrays[f"{name}-about"] = json.dumps([split.named, split.digest])
    keep(place, arrays)
