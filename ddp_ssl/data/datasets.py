"""Data sets by name. One more is a pair of functions and a line in `DATASETS`.

No torch and no DALI at import: the data are found before anything starts.
"""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ddp_ssl.data.cache import cache_folder, write_atomically
from ddp_ssl.data.manifest import Split
from ddp_ssl.data.order import generator
from ddp_ssl.data.scan import EXTENSIONS, images_below, scan

if TYPE_CHECKING:
    from ddp_ssl.config import Data

__all__ = ["DATASETS", "Dataset", "Split", "find", "load"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training images, validation images if there are any, and the names of the classes."""

    name: str
    train: Split
    val: Split | None
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """0 for unlabelled images."""
        return len(self.class_names)


class Source(NamedTuple):
    """How a data set is found (cheaply, before anything starts) and loaded (data, seed)."""

    find: Callable[[Data], None]
    load: Callable[[Data, int], Dataset]


def find(data: Data) -> None:
    """Raise a `ValueError` of one line unless the data can be found."""
    if data.name not in DATASETS:
        close = difflib.get_close_matches(data.name, DATASETS, 1, 0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"data.name: unknown data set {data.name!r}; {hint}accepted: {', '.join(DATASETS)}"
        )
    DATASETS[data.name].find(data)


def load(data: Data, seed: int) -> Dataset:
    """The data set. `seed` chooses the validation images where `data.val_fraction` does.

    Raises `ValueError`, one line with the key, for what cannot be used.
    """
    find(data)
    return DATASETS[data.name].load(data, seed)


# --- folders of images ---------------------------------------------------------------------------

LAYOUTS = "class folders under train/ and val/, class folders, or a flat folder of images"


def _find_folder(data: Data) -> None:
    root = _root(data, f"data.name={data.name} looks for {LAYOUTS}")
    train = root / "train"
    where = train if train.is_dir() else root
    if next(scan(os.fsencode(where)), None) is None:
        kinds = " ".join(sorted(e.decode() for e in EXTENSIONS))
        raise ValueError(
            f"data.root: {where} has no images ({kinds}) that are not hidden; accepted: {LAYOUTS}"
        )


def _load_folder(data: Data, seed: int) -> Dataset:
    root = _root(data, LAYOUTS)
    train = root / "train"
    if not train.is_dir():
        return _held_out("folder", *_images_below(root), data, seed)
    if not (root / "val").is_dir():
        return _held_out("folder", *_images_below(train), data, seed)
    return _train_and_val("folder", root)


def _train_and_val(name: str, root: Path) -> Dataset:
    """`train/` and `val/`, whose class folders must have the same names."""
    train, classes = _images_below(root / "train")
    val, _ = _images_below(root / "val", classes)
    return Dataset(name, train, val if len(val) else None, classes)


def _images_below(
    folder: Path, classes: tuple[str, ...] | None = None
) -> tuple[Split, tuple[str, ...]]:
    """The images of a folder, and its classes; given classes, those of another split, must fit."""
    split, found = images_below(folder)
    if classes is None:
        return split, found
    if not found and classes and len(split):
        raise ValueError(f"data.root: {folder} has no class folders; accepted: those of train/")
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in found if name not in number]
    if unknown:
        raise ValueError(
            f"data.root: {folder / unknown[0]} is a class that train/ does not have"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            + f"; accepted: the {len(classes)} class names of {folder.parent / 'train'}"
        )
    if found:
        numbers = np.array([number[name] for name in found])
        split = replace(split, labels=numbers[split.labels])
    return split, classes


def _held_out(name: str, images: Split, classes: tuple[str, ...], data: Data, seed: int) -> Dataset:
    """A seeded share of the images for validation: one at least, and one at least for training."""
    total = len(images)
    held = min(max(1, round(total * data.val_fraction)), total - 1)
    order = generator(seed, "validation").permutation(total)
    train, val = np.sort(order[held:]), np.sort(order[:held])
    return Dataset(name, images.subset(train), images.subset(val) if held else None, classes)


def _root(data: Data, wanted: str) -> Path:
    if not data.root:
        raise ValueError(f"data.root: unset; {wanted}")
    root = Path(os.path.abspath(os.path.expanduser(data.root)))
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"data.root: {root} {what}; {wanted}")
    return root


# --- handwritten digits --------------------------------------------------------------------------


def _find_digits(data: Data) -> None:
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        raise ValueError(
            "data.name: digits is a part of scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from None


def _load_digits(data: Data, seed: int) -> Dataset:
    """1,797 digits of 8x8, upscaled to 32x32 JPEGs in class folders, a stratified fifth for val."""
    folder = cache_folder() / "digits-32-v1"
    if not folder.is_dir():
        try:
            write_atomically(folder, _write_digits)
        except OSError as error:
            raise ValueError(
                f"DDP_SSL_CACHE: cannot write {folder}: {error.strerror}; accepted: a folder to "
                "write the digits to, once"
            ) from None
    return _train_and_val("digits", folder)


def _write_digits(folder: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    # A seed of its own: every run and every process shares these files.
    order = generator("digits").permutation(len(labels))
    for label in range(10):
        own = order[labels[order] == label]
        for place, i in enumerate(own):
            split = "val" if place < round(len(own) / 5) else "train"
            target = folder / split / str(label) / f"{i:04d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels[i]).resize((32, 32), Image.Resampling.BICUBIC)
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=95)
            target.write_bytes(encoded.getvalue())


# --- CIFAR ---------------------------------------------------------------------------------------

CIFAR = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "data_batch_1"),
    "cifar100": ("CIFAR100", "cifar-100-python", "train"),
}


def _find_cifar(data: Data) -> None:
    kind, folder, first = CIFAR[data.name]
    where = data.root or "FOLDER"
    fetch = (
        f'python -c "from torchvision.datasets import {kind}; {kind}({where!r}, download=True)" '
        "fetches it"
    )
    wanted = f"data.name={data.name} looks for torchvision's {folder}/ in it; {fetch}"
    root = _root(data, wanted)
    if not (root / folder / first).is_file():
        raise ValueError(f"data.root: {root} has no {folder}/{first}; {fetch}")


def _load_cifar(data: Data, seed: int) -> Dataset:
    """In memory, with the test split for validation. torchvision checks the files' MD5 first."""
    import torchvision.datasets

    kind, folder, _ = CIFAR[data.name]
    root = _root(data, folder)
    splits = []
    for train in (True, False):
        try:
            found = getattr(torchvision.datasets, kind)(str(root), train=train, download=False)
        except RuntimeError:
            raise ValueError(
                f"data.root: {root / folder} is incomplete or damaged (MD5); remove it and fetch "
                f'it with: python -c "from torchvision.datasets import {kind}; '
                f'{kind}({str(root)!r}, download=True)"'
            ) from None
        splits.append(Split.of_array(found.data, np.asarray(found.targets)))
    return Dataset(data.name, splits[0], splits[1], tuple(found.classes))


DATASETS: dict[str, Source] = {
    "digits": Source(_find_digits, _load_digits),
    "folder": Source(_find_folder, _load_folder),
    "cifar10": Source(_find_cifar, _load_cifar),
    "cifar100": Source(_find_cifar, _load_cifar),
}
