"""Small data sets that features are transferred to, in torchvision's layouts, and class folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddp_ssl.data.datasets import selection
from ddp_ssl.data.datasets.base import Dataset, Definition, root_of
from ddp_ssl.data.datasets.folders import has_folders, splits_of, train_and_val
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.errors import refused

if TYPE_CHECKING:
    from ddp_ssl.config import Data

# --- torchvision's -------------------------------------------------------------------------------


class Published(NamedTuple):
    """A class of torchvision, a file by which its data are known, and its splits.

    Where torchvision has no splits, `shots` images of each class are for training, and of the
    others at most `most` of each class for testing. The choice is the same in every run.
    """

    kind: str
    marker: str
    train: tuple[str, ...] = ()
    shots: int = 0
    most: int | None = None


PUBLISHED = {
    "food101": Published("Food101", "food-101/meta/train.json", ("train",)),
    "sun397": Published("SUN397", "SUN397/ClassName.txt", shots=50, most=50),
    "cars": Published("StanfordCars", "stanford_cars/devkit/cars_meta.mat", ("train",)),
    "aircraft": Published("FGVCAircraft", "fgvc-aircraft-2013b/data/variants.txt", ("trainval",)),
    "dtd": Published("DTD", "dtd/dtd/labels/train1.txt", ("train", "val")),
    "pets": Published("OxfordIIITPet", "oxford-iiit-pet/annotations/trainval.txt", ("trainval",)),
    "caltech101": Published("Caltech101", "caltech101/101_ObjectCategories", shots=30),
    "flowers102": Published("Flowers102", "flowers-102/setid.mat", ("train", "val")),
}


def find_published(data: Data) -> None:
    marker = PUBLISHED[data.name].marker
    wanted = f"data.name={data.name} looks for torchvision's {marker} in it"
    root = root_of(data, wanted)
    if not (root / marker).exists():
        raise ValueError(f"data.root: {root} has no {marker}; {wanted}")


def load_published(data: Data) -> Dataset:
    """Only the lists of images are torchvision's; no image is read here."""
    known, root = PUBLISHED[data.name], root_of(data, "")
    with refused(
        f"data.root: {root} holds no whole {data.name}",
        f"accepted: the files of torchvision.datasets.{known.kind}",
    ):
        import torchvision.datasets

        kind = getattr(torchvision.datasets, known.kind)
        if known.train:
            train, classes = listed(root, [kind(str(root), split) for split in known.train])
            test, same = listed(root, [kind(str(root), "test")])
            if same != classes:
                raise ValueError("its test images have other classes than those for training")
        else:
            every, classes = listed(root, [kind(str(root))])
            chosen = selection.per_class(every.labels, known.shots, 0)
            train, test = (every.subset(np.flatnonzero(mask)) for mask in (chosen, ~chosen))
            if known.most is not None:
                kept = selection.per_class(test.labels, known.most, 0)
                test = test.subset(np.flatnonzero(kept))
        return Dataset(data.name, train, test, classes)


def listed(root: Path, made: list[Any]) -> tuple[Split, tuple[str, ...]]:
    """The images of torchvision's splits, by name, and the names of their classes."""
    classes = [tuple(getattr(each, "classes", None) or each.categories) for each in made]
    pairs = sorted((os.path.relpath(path, root), n) for each in made for path, n in images_of(each))
    labels = np.array([number for _, number in pairs], np.int64)
    if (
        len({*classes}) > 1
        or not len(labels)
        or not 0 <= labels.min() <= labels.max() < len(classes[0])
    ):
        raise ValueError("its lists of images do not fit its classes")
    return Split.of_files(str(root), [os.fsencode(path) for path, _ in pairs], labels), classes[0]


def images_of(made: Any) -> list[tuple[str, int]]:
    """Path and class of each image; torchvision has no public name for them."""
    if hasattr(made, "_samples"):
        return [(path, int(number)) for path, number in made._samples]
    if hasattr(made, "index"):  # Caltech's: the number of each image in its class
        folder = os.path.join(made.root, "101_ObjectCategories")
        return [
            (os.path.join(folder, made.categories[number], f"image_{i:04d}.jpg"), number)
            for i, number in zip(made.index, made.y, strict=True)
        ]
    files = made._image_files if hasattr(made, "_image_files") else made._images
    return list(zip(map(str, files), made._labels, strict=True))


# --- class folders -------------------------------------------------------------------------------

WANTED = "class folders in train/, and in test/ or val/"


def splits_for_tests(root: Path) -> tuple[Path, Path] | None:
    """The folders of training and test images; None where there is no such pair."""
    if not root.is_dir():
        return None
    train, val, others = splits_of(root)
    test = next((root / name for name in others if name.lower() == "test"), None)
    if test is None or not has_folders(test):  # test images without classes are of no use here
        test = val
    return None if train is None or test is None else (train, test)


def find_train_test(data: Data) -> None:
    root = root_of(data, f"data.name={data.name} looks for {WANTED}")
    if splits_for_tests(root) is None:
        raise ValueError(f"data.root: {root} has not both; accepted: {WANTED}")


def load_train_test(data: Data) -> Dataset:
    found = splits_for_tests(root_of(data, WANTED))
    assert found is not None
    return train_and_val(data.name, *found)


DEFINITIONS = {
    "train_test": Definition(find_train_test, load_train_test),
    **{name: Definition(find_published, load_published) for name in PUBLISHED},
}
