"""Data sets by name. One more is a pair of functions in `sources/`, listed there in `SOURCES`.

No torch and no DALI at import: the data are found before anything starts.
"""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_ssl.data import selection, shards
from ddp_ssl.data.augment import Decoding, PixelFormat
from ddp_ssl.data.manifest import Split
from ddp_ssl.data.sources import arrays, digits, folders, lists
from ddp_ssl.data.sources.base import Dataset, Source, absolute, labelled_part

if TYPE_CHECKING:
    from ddp_ssl.config import Data

__all__ = ["DATASETS", "Dataset", "Source", "Split", "find", "load"]

logger = logging.getLogger("ddp_ssl")

DATASETS: dict[str, Source] = {
    **digits.SOURCES,
    **folders.SOURCES,
    **lists.SOURCES,
    **arrays.SOURCES,
}


def source_of(data: Data) -> Source:
    """What finds and loads the data that the config names: its files, or shards made of them."""
    if data.root and shards.is_shards(absolute(data.root)):
        return SHARDS
    for key, value, reset in (
        ("reader", data.reader, "indexed"), ("stage", data.stage, None), ("url", data.url, None)
    ):  # fmt: skip
        if value != reset:
            raise ValueError(
                f"data.{key}: {value} is for shards, and {data.root or 'data.root'} holds no "
                f"{shards.ABOUT}; ddp-ssl pack-shards makes them"
            )
    if data.name not in DATASETS:
        close = difflib.get_close_matches(data.name, DATASETS, 1, 0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"data.name: unknown data set {data.name!r}; {hint}accepted: {', '.join(DATASETS)}"
        )
    return DATASETS[data.name]


def find(data: Data) -> None:
    """Raise a `ValueError` of one line unless the data can be found."""
    source = source_of(data)
    if data.reader == "streamed" and (data.fraction < 1 or data.skip):
        key = "skip" if data.skip else "fraction"
        raise ValueError(
            f"data.{key}: a stream gives all images of the shards; pack them with it, or "
            "data.reader=indexed is accepted"
        )
    if data.url and (data.reader != "streamed" or data.stage):
        other = "data.stage copies from data.root" if data.stage else "data.reader is indexed"
        raise ValueError(f"data.url: only data.reader=streamed reads from there; {other}")
    if data.url and not data.url.startswith(("s3://", "gs://", "/")):
        raise ValueError(
            f"data.url: {data.url}; accepted: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or /FOLDER"
        )
    for key in ("files", "val_files"):
        if getattr(data, key) and data.name != "list":
            raise ValueError(f"data.{key}: is for data.name=list, not {data.name}; leave it out")
    source.find(data)
    if data.skip and not absolute(data.skip).is_file():
        raise ValueError(
            f"data.skip: {absolute(data.skip)} is not a file; accepted: a list of images, one path "
            "a line, as ddp-ssl check-data writes it"
        )


def load(data: Data, seed: int) -> Dataset:
    """The data set: its validation images held out where it has none, a `data.fraction` of the
    training images chosen by `seed`, and without those that `data.skip` lists.

    Images are left out last, so that a bad one does not change which others are chosen. Raises
    `ValueError`, one line with the key, for what cannot be used.
    """
    find(data)
    made = source_of(data).load(data)
    if made.val is None:
        made = _with_held_out(made, data)
    every, val = made.train, made.val
    chosen: selection.Mask = np.ones(len(every), np.bool_)
    if data.fraction < 1:
        chosen = selection.fraction_of(every.labels, data.fraction, seed)
    labelled = made.labelled
    if data.skip:
        skip = selection.Skip.of_file(absolute(data.skip), _base(data))
        keep = skip.keep(every)
        chosen &= keep
        labelled = labelled_part(every.subset(np.flatnonzero(keep)))
        if val is not None:
            val = val.subset(np.flatnonzero(skip.keep(val)))
        if skip.unknown:
            logger.warning(
                "data.skip: %d of the %d images in %s are not in the data",
                *(skip.unknown, len(skip.lines), data.skip),
            )
        for what, left in (("training", chosen.sum()), ("validation", val is None or len(val))):
            if not left:
                raise ValueError(f"data.skip: {data.skip} leaves no {what} images")
    train = every if chosen.all() else every.subset(np.flatnonzero(chosen))
    return replace(made, train=train, val=val, labelled=labelled)


def reading(data: Data, half: bool = False) -> dict[str, Any]:
    """What the config says of how images are read and decoded, for any loader."""
    return {
        "form": PixelFormat(*data.normalisation, half=half),
        "decoding": Decoding(data.hw_decoder_load, data.preallocate),
        "threads": data.threads,
        "prefetch": data.prefetch,
        "read_threads": data.read_threads,
    }


def stage(data: Data) -> None:
    """Copy shards to `data.stage`, once per node; for every process, which all wait for it."""
    if data.stage:
        find(data)
        assert data.root
        shards.stage(absolute(data.root), absolute(data.stage), logger.info)


def _find_shards(data: Data) -> None:
    shards.describe(absolute(data.root or ""), remote=bool(data.url))


def _load_shards(data: Data) -> Dataset:
    root = absolute(data.root or "")
    if data.stage:
        root = shards.stage(root, absolute(data.stage), logger.info)
    packed = shards.open_shards(root, remote=bool(data.url))
    if data.name != packed.name:
        raise ValueError(
            f"data.name: {data.root} holds shards of {packed.name}, not of {data.name}"
        )
    if data.reader == "streamed" and packed.val is None:
        raise ValueError(
            f"data.reader: {data.root} has no validation images of its own, and a stream cannot "
            "leave some of its images out; indexed is accepted"
        )
    return Dataset(packed.name, packed.train, packed.val, packed.class_names)


SHARDS = Source(_find_shards, _load_shards)


def _with_held_out(made: Dataset, data: Data) -> Dataset:
    """A share of the training images for validation; none where there is only one image."""
    held = selection.held_out(made.train.labels, data.val_fraction)
    if not held.any():
        return made
    train, val = (made.train.subset(np.flatnonzero(mask)) for mask in (~held, held))
    return replace(made, train=train, val=val, labelled=labelled_part(train))


def _base(data: Data) -> str:
    """The folder that names in `data.skip` may be relative to."""
    if data.files and not data.root:
        return str(absolute(data.files).parent)
    return str(absolute(data.root)) if data.root else os.getcwd()
