"""Data sets packed into tar shards: a folder with `shards.json`. numpy only.

`ddp-ssl pack-shards` writes the folder and `shards.json` last of all. For `train` and `val` it
holds the tar files, DALI's index of each (`.idx`), and arrays in the order of the original ids, so
that a run on shards sees the same images as a run on the files. Images stand in the tars under
numbers. Their names are in an array and are never used as paths.
"""

from __future__ import annotations

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_ssl.config.schema import SAME_AS
from ddp_ssl.data.datasets.base import Dataset, Definition, absolute
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.datasets.tar import Shards
from ddp_ssl.errors import refused
from ddp_ssl.utils.once import warn_once
from ddp_ssl.utils.sealed import CHECKSUM, checksum, unsealed

if TYPE_CHECKING:
    from ddp_ssl.config import Data

logger = logging.getLogger("ddp_ssl")

FORMAT = 2
UNCHECKED = 1  # the format of earlier versions, without checksums
ABOUT = "shards.json"
ORIGIN = ".origin"  # in a copy: the path of the original folder
# Of each array its dimensions and type.
ARRAYS = {
    "labels": (1, np.int64),
    "names": (1, np.uint8),
    "spans": (2, np.int64),
    "shard": (1, np.int32),
    "offset": (1, np.int64),
    "size": (1, np.int64),
    "crc": (1, np.uint32),
}
AGAIN = "copy it again, or pack it again with ddp-ssl pack-shards"
THREADS = 16


def is_shards(root: Path) -> bool:
    """Whether a folder holds shards, all of them: `shards.json` is written last."""
    return (root / ABOUT).is_file()


def open_shards(root: Path, remote: bool = False) -> Dataset:
    """The data set in a folder of shards, with the ids and digests of the data that was packed.

    Arrays are mapped, not read. With `remote` the training images' tar files are elsewhere. Raises
    `ValueError` (key `data.root`) where something is missing.
    """
    about = describe(root, remote)
    splits = {name: _open_split(root, name, kept) for name, kept in about["splits"].items()}
    return Dataset(about["name"], splits["train"], splits.get("val"), tuple(about["class_names"]))


def describe(root: Path, remote: bool = False) -> dict[str, Any]:
    """The content of `shards.json`; raises `ValueError` unless all tar files have their full size.

    With `remote` the tar files of the training images are elsewhere and are not looked for.
    """
    with refused(f"data.root: {root / ABOUT} is damaged or cannot be read", AGAIN):
        about, tars = _parse((root / ABOUT).read_text())
    if about["format"] not in (UNCHECKED, FORMAT):
        raise ValueError(
            f"data.root: {root} holds shards of format {about['format']}; accepted: {UNCHECKED} "
            f"and {FORMAT}, as this version's ddp-ssl pack-shards writes it"
        )
    if about["format"] == UNCHECKED:
        warn_once(
            f"data.root: {root} was packed by an earlier version, without checksums: it is read "
            "unchecked; ddp-ssl pack-shards into another folder adds them"
        )

    if remote:
        tars = [tar for tar in tars if not tar[0].startswith("train-")]
    with ThreadPoolExecutor(THREADS, "ddp_ssl-stat") as pool:
        for (file, expected), there in zip(
            tars, pool.map(lambda tar: file_size(root / tar[0]), tars), strict=True
        ):
            if there != expected:
                what = "is missing" if there < 0 else f"has {there} bytes instead of {expected}"
                raise ValueError(f"data.root: {root / file} {what}; {AGAIN}")
    return about


def _parse(text: str) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """The content of `shards.json`, and name and size of each tar file; raises if it is damaged."""
    about: dict[str, Any] = json.loads(text)
    if about["format"] == FORMAT:
        about = unsealed(text)
    elif about["format"] == UNCHECKED and CHECKSUM in about:
        raise ValueError("its format was changed")
    splits = about["splits"]
    tars = [(tar["file"], tar["bytes"]) for split in splits.values() for tar in split["tars"]]
    if "train" not in splits or not {"name", "class_names", "extensions"} <= about.keys():
        raise ValueError("it is incomplete")
    if any(not {"count", "digest"} <= split.keys() for split in splits.values()):
        raise ValueError("a split of it is incomplete")
    # A name from a file must not lead out of the folder.
    if any(not re.fullmatch(r"(train|val)-\d+\.tar", name) for name, _ in tars):
        raise ValueError("it names a file that is none of its own")
    return about, tars


def checked_files(kept: dict[str, Any], name: str) -> dict[str, int | None]:
    """The arrays and indices of a split by file name, with the checksum of each if it is known."""
    sums = kept.get("checksums")
    arrays = [f"{name}-{key}.npy" for key in ARRAYS if sums is not None or key != "crc"]
    indices = [tar["file"].removesuffix(".tar") + ".idx" for tar in kept["tars"]]
    return {file: None if sums is None else sums[file] for file in [*arrays, *indices]}


def _open_split(root: Path, name: str, kept: dict[str, Any]) -> Split:
    known = checked_files(kept, name)
    arrays = {
        key: _open_array(root / file, known[file], key, kept["count"])
        for key in ARRAYS
        if (file := f"{name}-{key}.npy") in known
    }
    paths = tuple(str(root / tar["file"]) for tar in kept["tars"])
    places = {key: arrays.pop(key) for key in ("shard", "offset", "size", "crc") if key in arrays}
    # Indices are read by a stream alone, and checked there.
    indices = [sum_ for file, sum_ in known.items() if not file.endswith(".npy")]
    where = Shards(paths, **places, index_crc=tuple(i for i in indices if i is not None) or None)
    # The split is part of a name, as with files. A copy has the names of the original folder, so
    # that `data.skip` means the same images on every node.
    try:
        named = (root / ORIGIN).read_text(errors="surrogateescape")
    except OSError:
        named = os.path.abspath(root)
    root_of_names, has_names = os.path.join(named, name), kept.get("named", True)
    split = Split(root=root_of_names, shards=where, named=has_names, **arrays)
    return split.known_by(kept["digest"])


def _open_array(path: Path, known: int | None, key: str, count: int) -> Any:
    """The array in a file, mapped; `known` is the file's checksum."""
    ndim, dtype = ARRAYS[key]
    try:
        if known is not None and checksum(path) != known:
            raise ValueError("its checksum differs")
        mapped = np.load(path, mmap_mode="r")
        if (mapped.ndim, mapped.dtype) != (ndim, dtype):
            raise ValueError("it is another array")
        if key != "names" and len(mapped) != count:
            raise ValueError("it has another length")
    except PermissionError as error:
        raise ValueError(f"data.root: {path} cannot be read: {error.strerror}") from None
    except Exception:  # without a checksum a damaged header makes numpy raise anything
        raise ValueError(f"data.root: {path} is missing or damaged; {AGAIN}") from None
    return np.asarray(mapped)  # `memmap` itself makes every index slower


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


# --- the definition ------------------------------------------------------------------------------


def find(data: Data) -> None:
    about = describe(absolute(data.root or ""), remote=bool(data.url))
    if SAME_AS.get(data.name, data.name) != SAME_AS.get(about["name"], about["name"]):
        raise ValueError(
            f"data.name: {data.root} holds shards of {about['name']}, not of {data.name}"
        )
    if data.reader == "streamed" and "val" not in about["splits"]:
        raise ValueError(
            f"data.reader: {data.root} has no validation images of its own, and a stream cannot "
            "leave some of its images out; indexed is accepted"
        )


def load(data: Data) -> Dataset:
    return open_shards(absolute(data.root or ""), remote=bool(data.url))


DEFINITION = Definition(find, load)
