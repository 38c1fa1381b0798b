"""Folders of images: any layout, and the data sets that are published as class folders."""

from __future__ import annotations

import itertools
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ddp_ssl.data.datasets.base import Dataset, Definition, prepare, root_of
from ddp_ssl.data.datasets.imagenet import imagenet100
from ddp_ssl.data.datasets.scan import (
    EXTENSIONS,
    NO_FOLDERS,
    entries,
    images_below,
    looks_like_image,
    scan,
)
from ddp_ssl.data.datasets.split import Names, Split
from ddp_ssl.utils.once import warn_once

if TYPE_CHECKING:
    from ddp_ssl.config import Data

logger = logging.getLogger("ddp_ssl")

# --- any folder ----------------------------------------------------------------------------------

LAYOUTS = "class folders under train/ and val/, class folders, or a flat folder of images"
# Names of the splits, the usual one first; upper and lower case are the same.
TRAIN = ("train", "training")
VAL = ("val", "valid", "validation")
LIKE_A_SPLIT = re.compile(
    r"(?:^|[^a-z])(?:train|training|trn|val|valid|validation|dev|eval|test|testing|holdout)"
    r"(?:[^a-z]|$)"
)
# Names of the folders of a data set of segmentation.
IMAGES = ("images", "image", "imgs", "img", "jpegimages")
MASKS = ("masks", "mask", "labels", "annotations", "segmentations", "segmentation", "gt")
FEW = 1000  # files of a folder that are looked at


class Splits(NamedTuple):
    """The folders of a root: of the training images, of the validation images, and all others."""

    train: Path | None
    val: Path | None
    others: list[str]


def splits_of(root: Path) -> Splits:
    """The splits of a folder, by the usual names of their folders."""
    there = [e for e in entries(os.fsencode(root)) if e.name.lower() not in NO_FOLDERS]
    names = [os.fsdecode(entry.name) for entry in there if os.path.isdir(entry.path)]

    def first(accepted: tuple[str, ...]) -> str | None:
        for wanted in accepted:
            same = [name for name in names if name.lower() == wanted]
            if same:
                return wanted if wanted in same else same[0]
        return None

    train, val = first(TRAIN), first(VAL)
    others = [name for name in names if name not in (train, val)]
    return Splits(root / train if train else None, root / val if val else None, others)


def beside_masks(folder: Path) -> Path:
    """The folder `images/` in a folder that holds nothing else but folders of masks; else itself.

    The data sets of segmentation are published like this.
    """
    there = [e for e in entries(os.fsencode(folder)) if e.name.lower() not in NO_FOLDERS]
    names = [os.fsdecode(entry.name) for entry in there if os.path.isdir(entry.path)]
    images = [name for name in names if name.lower() in IMAGES]
    masks = [name for name in names if name.lower() in MASKS]
    if len(images) != 1 or not masks or len(names) > 1 + len(masks):
        return folder
    warn_once(
        f"data.root: {folder}: {images[0]}/ is used, and {', '.join(f'{n}/' for n in masks)} is "
        "not: pretraining needs no masks, k-NN and the probe cannot use them",
        logging.INFO,
    )
    return folder / images[0]


def places_of(root: Path) -> Splits:
    """The splits of a folder, without masks beside the images of the folder or of a split."""
    train, val, others = splits_of(beside_masks(root))
    return Splits(train and beside_masks(train), val and beside_masks(val), others)


def find_folder(data: Data) -> None:
    root = root_of(data, f"data.name={data.name} looks for {LAYOUTS}")
    where = places_of(root).train or beside_masks(root)
    if next(scan(os.fsencode(where)), None) is None:
        kinds = " ".join(sorted(e.decode() for e in EXTENSIONS))
        raise ValueError(
            f"data.root: {where} has no images ({kinds}) that are not hidden; accepted: {LAYOUTS}"
        )


def load_folder(data: Data) -> Dataset:
    train, val, others = places_of(root_of(data, LAYOUTS))
    root = beside_masks(root_of(data, LAYOUTS))
    if train is None:
        images, classes = images_below(root)
        splits = [name for name in classes if LIKE_A_SPLIT.search(name.lower())]
        if splits:
            warn_once(
                f"data.root: {root}: classes are called {', '.join(splits[:3])}, like splits; "
                f"accepted for splits: {' or '.join(TRAIN)} and {' or '.join(VAL)}"
            )
        return Dataset("folder", images, None, classes)
    unused = [name for name in others if LIKE_A_SPLIT.search(name.lower())]
    unused += [name for name in others if name not in unused and holds_images(root / name)]
    if unused:
        used = f"{train.name}/ and {val.name}/ are" if val else f"{train.name}/ alone is"
        warn_once(
            f"data.root: {root}: {used} used; not used: {', '.join(f'{n}/' for n in unused[:3])}"
            + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
        )
    if val is not None:
        return train_and_val("folder", train, val)
    images, classes = images_below(train)
    return Dataset("folder", images, None, classes)


def holds_images(folder: Path) -> bool:
    """Whether there is an image among the first entries of a folder, or of a folder in it."""
    try:
        with os.scandir(folder) as found:
            some = list(itertools.islice(found, FEW))
        if any(looks_like_image(entry.name) for entry in some if not entry.name.startswith(".")):
            return True
        inside = next((entry for entry in some if entry.is_dir()), None)
        if inside is None:
            return False
        with os.scandir(inside) as found:
            return any(looks_like_image(entry.name) for entry in itertools.islice(found, FEW))
    except OSError:  # another user's folder beside the splits: the run does not need it
        return False


def train_and_val(
    name: str, train: Path, val: Path, only: tuple[str, ...] | None = None
) -> Dataset:
    """Two folders with class folders of the same names; `only` restricts the scan to some."""
    images, classes = images_below(train, only)
    held_out, found = images_below(val, only)
    if len(held_out) and classes:
        held_out = numbered_as(held_out, found, classes, train, val)
    elif found:  # the training images have no classes, so these are no labels
        held_out = replace(held_out, labels=np.full(len(held_out), -1))
    return Dataset(name, images, held_out if len(held_out) else None, classes)


def numbered_as(
    split: Split, found: tuple[str, ...], classes: tuple[str, ...], train: Path, val: Path
) -> Split:
    """The images of `val`, labelled by the class numbers of `train`."""
    if not found:
        raise ValueError(f"data.root: {val} has no class folders; accepted: those of {train}")
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in found if name not in number]
    if unknown:
        raise ValueError(
            f"data.root: {val / unknown[0]} is a class that {train.name}/ does not have"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            + f"; accepted: the {len(classes)} class names of {train}"
        )
    return replace(split, labels=np.array([number[name] for name in found])[split.labels])


# --- published as class folders ------------------------------------------------------------------


class Layout(NamedTuple):
    """Accepted names of the two folders, the number of classes, and the text of error messages."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    classes: int
    wanted: str


VALPREP = (
    "sort them with torchvision's ImageNet class (parse_val_archive; it needs the tar of the "
    "images and the devkit) or with the well-known script valprep.sh"
)
LAYOUT = {
    "imagenet": Layout(("train",), ("val",), 1000, "train/WNID/ and val/WNID/"),
    "imagenet100": Layout(
        ("train",), ("val",), 100, "ImageNet's train/WNID/ and val/WNID/, or its 100 classes alone"
    ),
    "inat21": Layout(
        ("train", "2021_train"),
        ("val", "2021_valid"),
        10_000,
        "class folders in train/ and val/, or torchvision's 2021_train/ and 2021_valid/",
    ),
    "inat21_mini": Layout(
        ("train_mini", "2021_train_mini"),
        ("val", "2021_valid"),
        10_000,
        "class folders in train_mini/ and val/, or torchvision's 2021_train_mini/ and 2021_valid/",
    ),
    "cinic10": Layout(("train",), ("test",), 10, "class folders in train/ and test/"),
    "tiny_imagenet": Layout(
        ("train",), ("val",), 200, "train/WNID/images/, and val/images/ with val_annotations.txt"
    ),
}


def find_published(data: Data) -> None:
    train, val = folders_of(data)
    if data.name == "imagenet100":
        lacking(data, train, [n for n in imagenet100() if not (train / n).is_dir()])
    if data.name == "tiny_imagenet" and not has_folders(val, besides="images"):
        return find_annotations(data, val)
    for folder in (train, val):
        if not has_folders(folder):
            flat = next(scan(os.fsencode(folder)), None) is not None
            raise ValueError(
                f"data.root: {folder} "
                + ("holds its images flat" if flat else "is empty")
                + f"; data.name={data.name} looks for {LAYOUT[data.name].wanted}"
                + (f"; {VALPREP}" if flat and data.name.startswith("imagenet") else "")
            )
    return None


def load_published(data: Data) -> Dataset:
    train, val = folders_of(data)
    only = imagenet100() if data.name == "imagenet100" else None
    if data.name == "tiny_imagenet" and not has_folders(val, besides="images"):
        images, classes = images_below(train)
        made = Dataset(data.name, images, annotated(val, classes), classes)
    else:
        made = train_and_val(data.name, train, val, only)
    if only:
        lacking(data, train, [name for name in only if name not in made.class_names])
    for folder, split in ((train, made.train), (val, made.val)):
        if split is None or not len(split):
            raise ValueError(
                f"data.root: {folder} has no images; data.name={data.name} looks for "
                f"{LAYOUT[data.name].wanted}; {prepare(data)} checks what is there"
            )
    expected = LAYOUT[data.name].classes
    if made.num_classes != expected:
        logger.warning(
            "%s: %d class folders in %s, where the whole data set has %d",
            *(data.name, made.num_classes, train, expected),
        )
    return made


def folders_of(data: Data) -> tuple[Path, Path]:
    """The folders of the training and validation images."""
    layout = LAYOUT[data.name]
    wanted = f"data.name={data.name} looks for {layout.wanted}; {where_from(data)}"
    root = root_of(data, wanted)
    if data.name == "tiny_imagenet" and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    found = []
    for names in (layout.train, layout.val):
        there = [name for name in names if (root / name).is_dir()]
        if not there:
            raise ValueError(f"data.root: {root} has no {names[0]}/; {wanted}")
        found.append(root / there[0])
    return found[0], found[1]


def where_from(data: Data) -> str:
    """How to get the data set."""
    if data.name.startswith("imagenet"):
        return f"image-net.org gives it to those who have a login; {prepare(data)} checks it"
    return f"{prepare(data)} --download fetches it"


def has_folders(folder: Path, besides: str = "") -> bool:
    """Whether `folder` holds a folder that is not hidden and not named `besides`."""
    with os.scandir(folder) as found:
        return any(
            entry.is_dir() and not entry.name.startswith(".") and entry.name != besides
            for entry in found
        )


def lacking(data: Data, train: Path, classes: list[str]) -> None:
    if classes:
        raise ValueError(
            f"data.root: {train} lacks {len(classes)} of the 100 classes of ImageNet-100, first "
            f"{classes[0]}/; data.name={data.name} looks for {LAYOUT[data.name].wanted}; "
            f"{where_from(data)}"
        )


# --- Tiny ImageNet's validation images -----------------------------------------------------------

ANNOTATIONS = "val_annotations.txt"


def find_annotations(data: Data, val: Path) -> None:
    for name in ("images", ANNOTATIONS):
        if not (val / name).exists():
            raise ValueError(
                f"data.root: {val} has no {name}; data.name=tiny_imagenet looks for "
                f"{LAYOUT['tiny_imagenet'].wanted}, or class folders in val/; "
                f"{where_from(data)}"
            )


def annotated(val: Path, classes: tuple[str, ...]) -> Split:
    """The images of `images/`; a file with lines `name, wnid, box` (tabs) gives the classes."""
    number = {name: i for i, name in enumerate(classes)}
    names, labels = Names(), []
    for at, line in enumerate((val / ANNOTATIONS).read_text().splitlines(), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in number:
            raise ValueError(
                f"data.root: {val / ANNOTATIONS}, line {at}: {wnid!r} is a class that train/ does "
                f"not have; accepted: an image and one of its {len(classes)} class names, "
                "separated by a tab"
            )
        names.append(b"images/" + os.fsencode(name))
        labels.append(number[wnid])
    return Split.of_files(str(val), names, np.array(labels, np.int64))


DEFINITIONS = {
    "folder": Definition(find_folder, load_folder),
    **{name: Definition(find_published, load_published) for name in LAYOUT},
}
