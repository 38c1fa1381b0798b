"""Data sets by name. A new one is a file beside this one with `DEFINITIONS`.

No torch and no DALI at import: the data are found before anything starts.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets import (
    containers,
    parquet,
    selection,
    several,
    shards,
    staging,
    webdataset,
)
from ddp_ssl.data.datasets.base import Dataset, Definition, absolute, labelled_part, place_of
from ddp_ssl.data.datasets.files import Files, is_pattern
from ddp_ssl.utils.once import warn_once
from ddp_ssl.utils.text import suggest

if TYPE_CHECKING:
    from ddp_ssl.config import Data

logger = logging.getLogger("ddp_ssl")


def _definitions() -> dict[str, Definition]:
    """The `DEFINITIONS` of all files of this folder, by name."""
    files = (file.name for file in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = (importlib.import_module(f"{__package__}.{f}") for f in files if f != "registry")
    found = (getattr(module, "DEFINITIONS", {}) for module in modules)
    return dict(sorted(item for definitions in found for item in definitions.items()))


DATASETS = _definitions()
# Beside tar files, img2dataset writes parquet files without images.
CONTAINERS = (webdataset.CONTAINER, parquet.CONTAINER)


def in_shards(data: Data) -> bool:
    """Whether the root is a folder of shards, and no pattern of files."""
    root = data.root or ""
    return bool(root) and not is_pattern(root) and shards.is_shards(place_of(root))


def container_of(data: Data) -> containers.Container[Any] | None:
    """The kind of files, as others wrote them, that the data set is to be read from."""
    if in_shards(data):
        return None
    return next((kind for kind in CONTAINERS if kind.accepts(data)), None)


def definition_of(data: Data) -> Definition:
    """The definition of the data set that the config names, or of the container it lies in."""
    if len(data.roots) > 1:
        return several.definition(data, [definition_of(data.at(root)) for root in data.roots])
    if in_shards(data):
        return shards.DEFINITION
    container = container_of(data)
    if container is not None:
        return container.definition
    if is_url(data.root):
        raise ValueError(
            f"data.root: {data.root} holds no {shards.ABOUT}, and no files of images are found "
            "there; accepted in an object store: shards, parquet and tar files; on a web server, "
            "which lists nothing, a pattern such as https://HOST/train-{000..099}.tar"
        )
    if data.stage is not None:
        raise ValueError(
            f"data.stage: {data.stage} is for shards, parquet and tar files, and "
            f"{data.root or 'data.root'} holds none; ddp-ssl pack-shards makes shards"
        )
    if data.columns is not None and data.name != "array":
        raise ValueError(
            f"data.columns: is for parquet and tar files, and {data.root or 'data.root'} holds "
            "none; leave it out"
        )
    if data.name not in DATASETS:
        hint = suggest(data.name, DATASETS)
        raise ValueError(
            f"data.name: unknown data set {data.name!r}{hint}; accepted: {', '.join(DATASETS)}"
        )
    return DATASETS[data.name]


def find(data: Data) -> None:
    """Raise a `ValueError` of one line unless the data can be found."""
    definition = definition_of(data)
    if data.stage_gb is not None and not data.stage:
        raise ValueError("data.stage_gb: is how much data.stage takes; set that too, or none")
    for key in ("files", "val_files"):
        if getattr(data, key) and data.name != "list":
            raise ValueError(f"data.{key}: is for data.name=list, not {data.name}; leave it out")
    definition.find(data)
    if data.skip and not absolute(data.skip).is_file():
        raise ValueError(
            f"data.skip: {absolute(data.skip)} is not a file; accepted: a list of images, one path "
            "a line, as ddp-ssl check-data writes it"
        )


def load(data: Data, seed: int) -> Dataset:
    """The data set as the config asks for it.

    Where it has no validation images, some training images are held out. `seed` chooses the
    `data.fraction` of the training images. Images listed in `data.skip` are left out last, so that
    a bad image does not change which others are chosen.

    Raises `ValueError`, one line with the key, for data that cannot be used.
    """
    find(data)
    container = container_of(data)
    if container is not None:
        files = container.stamped(data)
        made = container.load(data, _staged(data, files) if data.stage else files)
    else:
        copy = stage(data)
        made = shards.open_shards(copy, True) if copy else definition_of(data).load(data)
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
        for kind, left in (("training", chosen.sum()), ("validation", val is None or len(val))):
            if not left:
                raise ValueError(f"data.skip: {data.skip} leaves no {kind} images")
    train = every if chosen.all() else every.subset(np.flatnonzero(chosen))
    if made.num_classes == 1:
        warn_once(
            f"data: one class only ({made.class_names[0]}): the accuracy of k-NN and of the "
            "probe is 1 from the start and says nothing"
        )
    if val is not None and len(val) == 1:
        warn_once(
            "data: one validation image only: an accuracy is 0 or 1, and measures that compare "
            "images are nan; data.val_fraction holds out more"
        )
    return replace(made, train=train, val=val, labelled=labelled)


def stage(data: Data) -> str | None:
    """Copy shards or containers to local disk, once per node; the folder of the copy.

    Every process calls this after `find`, and all of them wait for the copy. Without `data.stage`
    nothing is copied.
    """
    if not data.stage:
        return None
    container = container_of(data)
    if container is not None:
        return _stage(data, container.stamped(data))
    to = absolute(data.stage)
    return str(staging.stage(place_of(data.root or ""), to, logger.info, data.stage_gb))


def _stage(data: Data, files: Files) -> str:
    root = files.base if is_pattern(data.root or "") else place_of(data.root or "")
    how = data.name, absolute(data.stage or ""), logger.info, data.stage_gb
    return str(staging.stage_files(root, files.base, files.stamps, *how))


def _staged(data: Data, files: Files) -> Files:
    """The files, of which those that were copied as they are stamped are read in the copy."""
    copy = Path(_stage(data, files))
    return files._replace(copied=staging.copies(copy, files.base, files.stamps))


def _with_held_out(made: Dataset, data: Data) -> Dataset:
    """A share of the training images for validation; none where there is only one image."""
    held = selection.held_out(made.train.labels, data.val_fraction)
    if not held.any():
        return made
    warn_once(
        f"data: no validation split is there: {held.sum()} of the {len(held)} images are held out "
        f"for validation (data.val_fraction={data.val_fraction:g})",
        logging.INFO,
    )
    train, val = (made.train.subset(np.flatnonzero(mask)) for mask in (~held, held))
    return replace(made, train=train, val=val, labelled=labelled_part(train))


def _base(data: Data) -> str:
    """The folder that names in `data.skip` may be relative to."""
    if data.files and not data.root:
        return str(absolute(data.files).parent)
    return place_of(data.root) if data.root else os.getcwd()
