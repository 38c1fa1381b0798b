"""Data sets packed into tar shards: a folder with `shards.json`, here or in a store. numpy only.

`ddp-ssl pack-shards` writes the folder and `shards.json` last of all. For `train` and `val` it
holds the tar files, and arrays in the order of the original ids, so that a run on shards sees the
same images as a run on the files. Images stand in the tars under
numbers. Their names are in an array and are never used as paths.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_ssl.config.schema import SAME_AS
from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets import remote
from ddp_ssl.data.datasets.base import Dataset, Definition, place_of
from ddp_ssl.data.datasets.remote import joined
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.datasets.tar import Shards
from ddp_ssl.errors import ConfigError, refused
from ddp_ssl.utils.once import warn_once
from ddp_ssl.utils.sealed import CHECKSUM, checksum, unsealed

if TYPE_CHECKING:
    from ddp_ssl.config import Data

FORMAT = 3
WITH_INDEX = 2  # with DALI's index of each tar file, which nothing reads any more
UNCHECKED = 1  # the format of earlier versions, without checksums
ABOUT = "shards.json"
ORIGIN = ".origin"  # in a copy: the place of the original folder
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


def is_shards(root: str | Path) -> bool:
    """Whether a place holds shards, all of them: `shards.json` is written last."""
    return remote.exists(joined(str(root), ABOUT))


def open_shards(root: str | Path, staged: bool = False) -> Dataset:
    """The data set in a folder of shards, with the ids and digests of the data that was packed.

    Arrays are mapped, or held in memory where the folder is in a store. Tar files that a copy lacks
    are read from the original. `staged`: the original of a copy can be asked now, so that it is not
    taken for the same once it has changed. Raises `ValueError` (key `data.root`) where something is
    missing.
    """
    about = describe(root)
    names = [tar["file"] for kept in about["splits"].values() for tar in kept["tars"]]
    sizes = [tar["bytes"] for kept in about["splits"].values() for tar in kept["tars"]]
    found = dict(zip(names, _tars(str(root), names, sizes, staged), strict=True))
    splits = {
        name: _open_split(str(root), name, kept, [found[tar["file"]] for tar in kept["tars"]])
        for name, kept in about["splits"].items()
    }
    return Dataset(about["name"], splits["train"], splits.get("val"), tuple(about["class_names"]))


def describe(root: str | Path) -> dict[str, Any]:
    """The content of `shards.json`; raises `ValueError` if it is damaged."""
    place = joined(str(root), ABOUT)
    with refused(f"data.root: {place} is damaged or cannot be read", AGAIN):
        about = _parse(remote.content(place).decode())
    if about["format"] not in (UNCHECKED, WITH_INDEX, FORMAT):
        raise ValueError(
            f"data.root: {root} holds shards of format {about['format']}; accepted: {UNCHECKED} "
            f"to {FORMAT}, as this version's ddp-ssl pack-shards writes it"
        )
    if about["format"] == UNCHECKED:
        warn_once(
            f"data.root: {root} was packed by an earlier version, without checksums: it is read "
            "unchecked; ddp-ssl pack-shards into another folder adds them"
        )
    return about


def _tars(
    root: str, names: Sequence[str], sizes: Sequence[int], staged: bool = False
) -> list[tuple[str, str, str | None]]:
    """Of each tar file: its place, that of the original, and its tag if that is in a store.

    Raises `ValueError` unless all have their full size.
    """
    here = [joined(root, name) for name in names]
    origin = origin_of(root)
    there = here if origin is None else [joined(origin, name) for name in names]
    stamps = remote.stamps(here)
    lacking = [k for k, size in enumerate(sizes) if (stamps[k] or (-1,))[0] != size]
    places = list(here)
    if origin is not None and lacking:
        for k, stamp in zip(lacking, remote.stamps([there[k] for k in lacking]), strict=True):
            places[k], stamps[k] = there[k], stamp
    for place, size, stamp in zip(places, sizes, stamps, strict=True):
        if stamp is None or stamp[0] != size:
            what = "is missing" if stamp is None else f"has {stamp[0]} bytes instead of {size}"
            raise ValueError(f"data.root: {place} {what}; {AGAIN}")
    tags = [stamp[1] if stamp and is_url(place) else None
            for place, stamp in zip(places, stamps, strict=True)]  # fmt: skip
    if staged and is_url(origin):
        tags = [stamp and stamp[1] for stamp in remote.stamps(there)]
    return list(zip(places, there, tags, strict=True))


def origin_of(root: str) -> str | None:
    """The place that a folder is a copy of; None if it is none."""
    try:
        return None if is_url(root) else Path(root, ORIGIN).read_text(errors="surrogateescape")
    except OSError:
        return None


def _parse(text: str) -> dict[str, Any]:
    """The content of `shards.json`; raises if it is damaged."""
    about: dict[str, Any] = json.loads(text)
    if about["format"] in (WITH_INDEX, FORMAT):
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
    return about


def checked_files(kept: dict[str, Any], name: str) -> dict[str, int | None]:
    """The arrays of a split by file name, with the checksum of each if it is known."""
    sums = kept.get("checksums")
    arrays = [f"{name}-{key}.npy" for key in ARRAYS if sums is not None or key != "crc"]
    return {file: None if sums is None else sums[file] for file in arrays}


def _open_split(
    root: str, name: str, kept: dict[str, Any], tars: Sequence[tuple[str, str, str | None]]
) -> Split:
    known = checked_files(kept, name)
    in_memory = is_url(root) or origin_of(root) is not None  # a copy may go while it is used
    arrays = {
        key: _open_array(joined(root, file), known[file], key, kept["count"], in_memory)
        for key in ARRAYS
        if (file := f"{name}-{key}.npy") in known
    }
    places = {key: arrays.pop(key) for key in ("shard", "offset", "size", "crc") if key in arrays}
    paths, origins, tags = zip(*tars, strict=True) if tars else ((), (), ())
    where = Shards(paths, **places, origins=origins, tags=tags)
    # The split is part of a name, as with files. A copy has the names of the original folder, so
    # that `data.skip` means the same images on every node.
    named = origin_of(root) or place_of(root)
    split = Split(root=joined(named, name), shards=where, named=kept.get("named", True), **arrays)
    return split.known_by(kept["digest"])


def _open_array(place: str, known: int | None, key: str, count: int, in_memory: bool) -> Any:
    """The array in a file, mapped or in memory; `known` is the file's checksum."""
    ndim, dtype = ARRAYS[key]
    try:
        if in_memory:
            encoded = remote.content(place)
            if known is not None and zlib.crc32(encoded) != known:
                raise ValueError("its checksum differs")
            mapped = np.load(io.BytesIO(encoded))
        elif known is not None and checksum(Path(place)) != known:
            raise ValueError("its checksum differs")
        else:
            mapped = np.load(place, mmap_mode="r")
        if (mapped.ndim, mapped.dtype) != (ndim, dtype):
            raise ValueError("it is another array")
        if key != "names" and len(mapped) != count:
            raise ValueError("it has another length")
    except ConfigError:  # the store's
        raise
    except PermissionError as error:
        raise ValueError(f"data.root: {place} cannot be read: {error.strerror}") from None
    except Exception:  # without a checksum a damaged header makes numpy raise anything
        raise ValueError(f"data.root: {place} is missing or damaged; {AGAIN}") from None
    return np.asarray(mapped)  # `memmap` itself makes every index slower


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


# --- the definition ------------------------------------------------------------------------------


def find(data: Data) -> None:
    about = describe(place_of(data.root or ""))
    if SAME_AS.get(data.name, data.name) != SAME_AS.get(about["name"], about["name"]):
        raise ValueError(
            f"data.name: {data.root} holds shards of {about['name']}, not of {data.name}"
        )


def load(data: Data) -> Dataset:
    return open_shards(place_of(data.root or ""))


DEFINITION = Definition(find, load)
