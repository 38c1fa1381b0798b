"""Several roots as one data set: one after the other; classes of one name are the same class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddp_ssl.data.datasets import folders
from ddp_ssl.data.datasets.base import Dataset, Definition, absolute
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.utils.once import warn_once

if TYPE_CHECKING:
    from ddp_ssl.config import Data


def definition(data: Data, each: Sequence[Definition]) -> Definition:
    """The roots of `data`, whose definitions are `each`; folders of image files are accepted."""
    parts = [(data.at(root), one) for root, one in zip(data.roots, each, strict=True)]

    def find(_: Data) -> None:
        for one, definition in parts:
            if definition not in folders.DEFINITIONS.values():
                what = f"{one.root} is a root of shards, parquet or tar files"
                if data.name not in folders.DEFINITIONS:
                    what = f"data.name={data.name} takes one root"
                raise ValueError(
                    f"data.root: {what}; several roots are accepted for folders of image files "
                    f"({', '.join(folders.DEFINITIONS)})"
                )
            definition.find(one)
        for root, count in Counter(map(os.path.realpath, map(absolute, data.roots))).items():
            if count > 1:
                raise ValueError(f"data.root: {root} is given {count} times; accepted: once")

    def load(_: Data) -> Dataset:
        return joined(data, [definition.load(one) for one, definition in parts])

    return Definition(find, load)


def joined(data: Data, parts: Sequence[Dataset]) -> Dataset:
    """The classes of the first one keep their numbers; new names of the others follow.

    Validation images are those of all roots that have some.
    """
    classes = tuple(dict.fromkeys(name for part in parts for name in part.class_names))
    number = {name: i for i, name in enumerate(classes)}
    # The last entry is for the label -1.
    renumbered = [np.array([*map(number.get, part.class_names), -1]) for part in parts]
    train = Split.joined([part.train for part in parts], renumbered)
    apart = [(part.val, new) for part, new in zip(parts, renumbered, strict=True) if part.val]
    if apart and len(apart) < len(parts):
        without = [root for root, part in zip(data.roots, parts, strict=True) if not part.val]
        warn_once(f"data.root: {', '.join(without)}: no validation images; the others' are used")
    val = Split.joined([v for v, _ in apart], [new for _, new in apart]) if apart else None
    return Dataset(parts[0].name, train, val, classes)
