"""Data sets packed into tar shards: a folder with `shards.json`. numpy only.

`ddp-ssl pack-shards` writes the folder and `shards.json` last of all. For `train` and `val` it
holds the tar files, DALI's index of each (`.idx`), and arrays in the order of the original ids, so
that a run on shards sees the same images as a run on the files. Images stand in the tars under
numbers. Their names are in an array and are never used as paths.
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_ssl.data.datasets.base import Dataset, Definition, absolute
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.datasets.tar import Shards

if TYPE_CHECKING:
    from ddp_ssl.config import Data

FORMAT = 1
ABOUT = "shards.json"
ORIGIN = ".origin"  # in a copy: the path of the original folder
ARRAYS = {"labels": 1, "names": 1, "spans": 2, "shard": 1, "offset": 1, "size": 1}
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
    again = "copy it again, or pack it again with ddp-ssl pack-shards"
    try:
        about = json.loads((root / ABOUT).read_text())
        if about["format"] != FORMAT:
            raise ValueError(
                f"data.root: {root} holds shards of format {about['format']}; accepted: {FORMAT}, "
                "as this version's ddp-ssl pack-shards writes it"
            )
        tars = [(tar["file"], tar["bytes"]) for s in about["splits"].values() for tar in s["tars"]]
        damaged = "train" not in about["splits"] or not {"name", "class_names", "extensions"} <= {
            *about
        }
        # A name from a file must not lead out of the folder.
        damaged = damaged or any(not re.fullmatch(r"(train|val)-\d+\.tar", t[0]) for t in tars)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        damaged = True
    if damaged:
        raise ValueError(f"data.root: {root / ABOUT} is damaged or cannot be read; {again}")

    if remote:
        tars = [tar for tar in tars if not tar[0].startswith("train-")]
    with ThreadPoolExecutor(THREADS, "ddp_ssl-stat") as pool:
        for (file, expected), there in zip(
            tars, pool.map(lambda tar: file_size(root / tar[0]), tars), strict=True
        ):
            if there != expected:
                what = "is missing" if there < 0 else f"has {there} bytes instead of {expected}"
                raise ValueError(f"data.root: {root / file} {what}; {again}")
    return about  # type: ignore[no-any-return]


def _open_split(root: Path, name: str, kept: dict[str, Any]) -> Split:
    arrays: dict[str, Any] = {}
    for key, ndim in ARRAYS.items():
        path = root / f"{name}-{key}.npy"
        try:
            mapped = np.load(path, mmap_mode="r")
            fits = mapped.ndim == ndim and (key == "names" or len(mapped) == kept["count"])
        except (OSError, ValueError, EOFError):
            fits = False
        if not fits:
            raise ValueError(
                f"data.root: {path} is missing or damaged; copy it again, or pack the data again "
                "with ddp-ssl pack-shards"
            )
        arrays[key] = np.asarray(mapped)  # `memmap` itself makes every index slower
    paths = tuple(str(root / tar["file"]) for tar in kept["tars"])
    where = Shards(paths, arrays.pop("shard"), arrays.pop("offset"), arrays.pop("size"))
    # The split is part of a name, as with files. A copy has the names of the original folder, so
    # that `data.skip` means the same images on every node.
    try:
        named = (root / ORIGIN).read_text(errors="surrogateescape")
    except OSError:
        named = os.path.abspath(root)
    split = Split(root=os.path.join(named, name), shards=where, **arrays)
    return split.known_by(kept["digest"])


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


# --- the definition ------------------------------------------------------------------------------


def find(data: Data) -> None:
    about = describe(absolute(data.root or ""), remote=bool(data.url))
    if data.name != about["name"]:
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
