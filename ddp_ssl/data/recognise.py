"""What a place of images holds: which data set, how many images, how large. No torch, no DALI."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from ddp_ssl.data.datasets import array_files, arrays, folders, registry, remote, shards, transfer
from ddp_ssl.data.datasets.base import absolute, place_of
from ddp_ssl.data.datasets.lists import opened
from ddp_ssl.data.datasets.remote import joined
from ddp_ssl.data.datasets.scan import scan
from ddp_ssl.data.loading.decodable import FORMATS, first_line, pixels, worth_trying
from ddp_ssl.errors import ConfigError
from ddp_ssl.utils.files import json_mapping
from ddp_ssl.utils.text import counted

if TYPE_CHECKING:
    from ddp_ssl.config import Data

T = TypeVar("T")

MOST = 100_000  # images that are counted; more make no difference to a choice
SAMPLE = 50  # images whose size is looked at

# Files by which a published data set is recognised: one of the tuples, all of its paths.
FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "cifar10": (("cifar-10-batches-py/data_batch_1",),),
    "cifar100": (("cifar-100-python/train",),),
    "stl10": (("stl10_binary/train_X.bin",), ("train_X.bin", "test_X.bin")),
    "tiny_imagenet": (("tiny-imagenet-200/train",), ("train", "val/val_annotations.txt")),
    "imagenet": (("train/n01440764", "train/n15075141", "val"),),  # its first and last class
    "inat21": (("2021_train", "2021_valid"),),
    "inat21_mini": (("2021_train_mini", "2021_valid"),),
    "cinic10": (("train/airplane", "test/airplane", "imagenet-contributors.csv"),),
    **{
        name: tuple((f"{stem}{size}.npz",) for size in arrays.MEDMNIST_SIZES)
        for name, (stem, _) in arrays.MEDMNIST.items()
    },
    **{name: ((known.marker,),) for name, known in transfer.PUBLISHED.items()},
}
# Side in pixels and training images of what is not counted.
KNOWN = {
    "cifar10": (32, 50_000), "cifar100": (32, 50_000), "stl10": (96, 105_000),
    "tiny_imagenet": (64, 100_000), "cinic10": (32, 90_000), "imagenet": (400, 1_281_167),
    "imagenet100": (400, 126_689), "inat21": (500, 2_686_843), "inat21_mini": (500, 500_000),
    "blood": (28, 11_959), "organa": (28, 34_561), "organc": (28, 12_975), "organs": (28, 13_932),
    "food101": (475, 75_750), "sun397": (700, 19_850), "cars": (600, 8_144),
    "aircraft": (860, 6_667), "dtd": (480, 3_760), "pets": (430, 3_680), "caltech101": (270, 3_030),
    "flowers102": (600, 2_040),
}  # fmt: skip


class Look(NamedTuple):
    """What was seen: the name of the data set, words for it, training images, and their side.

    `images` is 0 where it is not known, and a lower bound where `capped`. `colours`: whether
    the images have some.
    """

    name: str
    what: str
    images: int
    side: int
    capped: bool = False
    colours: bool = True

    @property
    def number(self) -> str:
        """`images` in words."""
        return f"at least {self.images}" if self.capped else str(self.images or "some")


def look_at(data: Data, name: str | None) -> Look:
    """Look at the images of a config. `name`: of the data set, if the user gave one.

    Lists folders up to `MOST` images and reads the sizes of a few. Raises `ConfigError` for a
    place that holds no images or cannot be read.
    """
    try:
        return _look(data, name)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        text = str(error)
        if not text.startswith("data."):  # not by the readers, which name the key
            key = "files" if data.files else "root"
            place = getattr(error, "filename", None) or absolute(data.files or data.root or "")
            text = (
                f"data.{key}: {os.fsdecode(place)} cannot be read: {first_line(error)}; accepted: "
                "images that whoever runs this may read"
            )
        raise ConfigError(text) from None


def _look(data: Data, name: str | None) -> Look:
    name = name or _name_of(data)
    data = data.model_copy(update={"name": name})
    if data.root or data.files:
        registry.find(data)
    if len(data.roots) > 1:
        looks = [_look(data.at(root), name) for root in data.roots]
        what = f"images in {len(looks)} roots"
        side = round(statistics.median(look.side for look in looks))
        capped = any(look.capped for look in looks)
        return Look(name, what, sum(look.images for look in looks), side, capped)
    if name == "array" and data.root:
        found = array_files.split_arrays(data)
        x = found["train"].images
        count = _training(data, len(x), "val" in found)
        side = round(math.sqrt(x.shape[1] * x.shape[2]))
        colours = array_files.has_colours(x.shape[3], str(x.dtype))
        return Look(name, f"{_images(count)} in arrays", count, side, colours=colours)
    if registry.in_shards(data):
        splits = shards.describe(place_of(data.root or ""))["splits"]
        count = _training(data, int(splits["train"]["count"]), "val" in splits)
        return Look(name, f"{_images(count)} in shards", count, KNOWN.get(name, (224, 0))[0])
    root = absolute(data.root) if data.root else None
    if name in KNOWN:
        side, count = KNOWN[name]
        if name in arrays.MEDMNIST and root is not None:
            side = int(arrays.medmnist_file(data).stem.partition("_")[2] or side)
        return Look(name, name, count, side)
    if root is not None and (container := registry.container_of(data)) is not None:
        rows, some = container.look(data, SAMPLE)
        count = _training(data, rows, bool(container.files_of(data).val))
        side = _median([pixels(np.frombuffer(content, np.uint8)) for content in some])
        return Look(name, f"{_images(count)} in {container.what}", count, side)
    if name == "list" and data.files:
        return _listed(data)
    return _folder(data, root) if root is not None else Look(name, name, 0, 224)


def _name_of(data: Data) -> str:
    """`data.name` by the files that are there."""
    if data.files or not data.root:
        return "list" if data.files else data.name
    if registry.in_shards(data):
        about = json_mapping(remote.content(joined(place_of(data.root), shards.ABOUT)))
        return name if (name := about.get("name")) in registry.DATASETS else "folder"
    root = absolute(data.root)
    found = [name for name in FILES if holds(root, name)]
    if len(found) > 1:
        raise ConfigError(
            f"data.root: {root} holds {' and '.join(found)}; data.name={found[0]} chooses one"
        )
    if found or not array_files.is_place(root) or registry.container_of(data) is not None:
        return found[0] if found else "folder"
    images = root.is_dir() and next(scan(os.fsencode(root)), None) is not None
    return "folder" if images else "array"


def holds(root: Path, name: str) -> bool:
    """Whether a folder holds the published data set `name`, by its `FILES`."""
    return any(all((root / path).exists() for path in paths) for paths in FILES.get(name, ()))


def _folder(data: Data, root: Path) -> Look:
    train, val, _ = folders.places_of(root)
    where = train or folders.beside_masks(root)
    names = list(itertools.islice(scan(os.fsencode(where)), MOST))
    capped = len(names) == MOST
    classes = len({name.partition(b"/")[0] for name in names if b"/" in name})
    side = _side("data.root", [where / os.fsdecode(name) for name in _some(names)])
    count = _training(data, len(names), val is not None)
    kind = "without classes"
    if classes:
        kind = f"in {'at least ' if capped else ''}{counted(classes, 'folder')}"
    return Look("folder", f"{_images(count)} {kind}", count, side, capped)


def _listed(data: Data) -> Look:
    assert data.files is not None
    file = absolute(data.files)
    base = absolute(data.root) if data.root else file.parent
    with opened(file) as lines:
        some = list(itertools.islice(lines, MOST))
    names = [line.strip() for line in some if line.strip()]
    paths = [base / name.partition(mark)[0] for name in _some(names) for mark in ",\t; "]
    there = [path for path in paths if os.path.isfile(path)]
    if names and not there:
        raise ConfigError(
            f"data.files: {file}: none of its first files is there, such as {paths[0]}; the "
            "names are paths from data.root or, if it is unset, from the list's folder"
        )
    side = _side("data.files", there)
    count = _training(data, len(names), bool(data.val_files))
    return Look("list", f"{_images(count)} in a list", count, side, len(some) == MOST)


def _images(count: int) -> str:
    return "image" if count == 1 else "images"


def _training(data: Data, count: int, has_val: bool) -> int:
    """Images that are left for training."""
    held = 0 if has_val or count < 2 else max(1, round(count * data.val_fraction))
    return round((count - held) * data.fraction)


def _some(names: list[T]) -> list[T]:
    return names[:: max(1, len(names) // SAMPLE)]


def _side(key: str, paths: list[Path]) -> int:
    """The median side in pixels, of a square of the same area; 224 where no image can be read.

    Raises `ConfigError` where all files begin with something else than an image.
    """
    areas, others = [], []
    for path in paths:
        with contextlib.suppress(OSError):  # the run itself replaces and lists bad images
            content = np.fromfile(path, np.uint8)
            areas.append(pixels(content))
            if not areas[-1] and not worth_trying(content):
                others.append((path, content[:24].tobytes()))
    if others and len(others) == len(areas):
        path, start = others[0]
        raise ConfigError(
            f"{key}: none of {counted(len(others), 'file')} is an image; {path} begins with "
            f"{start!r}; accepted: {', '.join(FORMATS)}"
        )
    return _median(areas)


def _median(areas: list[int]) -> int:
    """The median side of images with so many pixels; 0 is unknown."""
    sides = [math.sqrt(area) for area in areas if area]
    return round(statistics.median(sides)) if sides else 224
