"""`Dataset`, its `Definition`, and helpers for definitions."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ddp_ssl.config.section import is_url
from ddp_ssl.data.datasets.split import Split

if TYPE_CHECKING:
    from ddp_ssl.config import Data


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images to pretrain on, to validate on if there are any, and the names of the classes.

    `labelled`: the training images whose class is known, for the k-NN bank and the probe of
    `ddp_ssl.evaluate`; None where there are none. The default is made of `train`. It differs from
    `train` where `data.fraction` takes a part or where some images have no label.
    """

    name: str
    train: Split
    val: Split | None
    class_names: tuple[str, ...] = ()
    labelled: Split | None = None

    def __post_init__(self) -> None:
        if self.labelled is None:
            object.__setattr__(self, "labelled", labelled_part(self.train))

    @property
    def num_classes(self) -> int:
        """0 for unlabelled images."""
        return len(self.class_names)


class Definition(NamedTuple):
    """How a data set is found and loaded.

    `find` is cheap and runs before anything starts; it raises a `ValueError` of one line. `load`
    returns all images, and None for `val` where no images are set apart for validation.
    """

    find: Callable[[Data], None]
    load: Callable[[Data], Dataset]


def labelled_part(split: Split) -> Split | None:
    """The images whose class is known: the split itself if all are, None if none is."""
    known = split.labels >= 0
    if known.all():
        return split if len(split) else None
    return split.subset(np.flatnonzero(known)) if known.any() else None


def root_of(data: Data, wanted: str) -> Path:
    """The folder `data.root`, absolute. `wanted` ends the message if there is none."""
    if not data.root:
        raise ValueError(f"data.root: unset; {wanted}")
    root = absolute(data.root)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"data.root: {root} {what}; {wanted}")
    return root


def absolute(path: str) -> Path:
    """An absolute path, links kept, `~` expanded."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def place_of(root: str) -> str:
    """The absolute path, or the address, of a root."""
    return root.rstrip("/") if is_url(root) else str(absolute(root))


def prepare(data: Data) -> str:
    """The command that fetches and checks a data set."""
    root = shlex.quote(data.root) if data.root else "FOLDER"
    return f"ddp-ssl prepare-data {data.name} {root}"
