"""Data sets published as arrays and held in memory: CIFAR, STL-10 and MedMNIST."""

from __future__ import annotations

import codecs
import hashlib
import io
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.datasets.base import Dataset, Definition, prepare, root_of
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.errors import refused
from ddp_ssl.utils.text import one_line

if TYPE_CHECKING:
    from ddp_ssl.config import Data

logger = logging.getLogger("ddp_ssl")
# By which numpy's arrays are pickled; its module has changed its name.
reconstruct = np.empty(0).__reduce__()[0]

Pixels = NDArray[np.uint8]

# --- CIFAR ---------------------------------------------------------------------------------------

CIFAR = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "data_batch_1"),
    "cifar100": ("CIFAR100", "cifar-100-python", "train"),
}
LABELS = ("labels", "fine_labels")


def find_cifar(data: Data) -> None:
    _, folder, first = CIFAR[data.name]
    fetch = f"{prepare(data)} --download fetches it"
    wanted = f"data.name={data.name} looks for torchvision's {folder}/ in it; {fetch}"
    root = root_of(data, wanted)
    if not (root / folder / first).is_file():
        raise ValueError(f"data.root: {root} has no {folder}/{first}; {fetch}")


def load_cifar(data: Data) -> Dataset:
    """The test split is for validation. Other files than the published ones are a warning."""
    import torchvision.datasets  # its tables of files and MD5 sums

    kind = getattr(torchvision.datasets, CIFAR[data.name][0])
    folder = root_of(data, kind.base_folder) / kind.base_folder
    meta = [(kind.meta["filename"], kind.meta["md5"])]
    others: list[str] = []
    splits = [
        Split.of_array(*cifar_images([cifar_file(data, folder / f, m, others) for f, m in files]))
        for files in (kind.train_list, kind.test_list)
    ]
    classes = cifar_file(data, folder / meta[0][0], meta[0][1], others)[kind.meta["key"]]
    if others:
        logger.warning(
            "data.root: %s: %s: not the published content, by MD5", folder, ", ".join(others)
        )
    return Dataset(data.name, splits[0], splits[1], tuple(map(str, classes)))


def cifar_file(data: Data, file: Path, md5: str, others: list[str]) -> dict[str, Any]:
    """The content of one of the pickles; its name joins `others` if the MD5 sum is another."""
    try:
        content = file.read_bytes()
        made = Plain(io.BytesIO(content), encoding="latin1").load()
        wanted = {"data", *LABELS} & made.keys()
        if len(made.get("data", ())) != len(made.get(min(wanted - {"data"}, default=""), ())):
            raise ValueError("no label for each image")
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"data.root: {file} cannot be used ({one_line(error, 100)}); "
            f"{prepare(data)} --download fetches it"
        ) from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        others.append(file.name)
    return made  # type: ignore[no-any-return]


def cifar_images(parts: list[dict[str, Any]]) -> tuple[Pixels, NDArray[np.int64]]:
    """`[M, 32, 32, 3]` and the labels; files hold an image as 3 x 32 x 32 numbers."""
    pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = [label for part in parts for key in LABELS for label in part.get(key, ())]
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), np.asarray(labels, np.int64)


class Plain(pickle.Unpickler):
    """Reads numbers, texts and arrays; a pickle of anything else is refused and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """The classes that an array of numbers is made of."""
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return {"_reconstruct": reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}[name]
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name} is no array of numbers")


# --- STL-10 --------------------------------------------------------------------------------------

STL10_CLASSES = (
    *("airplane", "bird", "car", "cat", "deer"),
    *("dog", "horse", "monkey", "ship", "truck"),
)
STL10_SIDE = 96
STL10_FILES = ("train_X.bin", "train_y.bin", "unlabeled_X.bin", "test_X.bin", "test_y.bin")


def find_stl10(data: Data) -> None:
    folder = stl10_folder(data)
    image = 3 * STL10_SIDE**2
    for name in STL10_FILES:
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size == 0 or (name.endswith("_X.bin") and size % image):
            what = f"{size} bytes, which is no number of images" if size else "missing or empty"
            raise ValueError(
                f"data.root: {file} is {what}; data.name=stl10 looks for the binary version's "
                f"{', '.join(STL10_FILES)}; {prepare(data)} --download fetches it"
            )


def load_stl10(data: Data) -> Dataset:
    """`train` holds the 5,000 labelled images, then the 100,000 unlabelled ones (label -1)."""
    folder = stl10_folder(data)
    labels = stl10_labels(folder, "train")
    files = [folder / "train_X.bin", folder / "unlabeled_X.bin"]
    train = stl10_images(files)
    every = np.full(len(train), -1)
    every[: len(labels)] = labels
    val = Split.of_array(stl10_images([folder / "test_X.bin"]), stl10_labels(folder, "test"))
    return Dataset("stl10", Split.of_array(train, every), val, STL10_CLASSES)


def stl10_folder(data: Data) -> Path:
    root = root_of(
        data,
        f"data.name=stl10 looks for torchvision's stl10_binary/ in it; {prepare(data)} --download "
        "fetches it",
    )
    return root / "stl10_binary" if (root / "stl10_binary").is_dir() else root


def stl10_images(files: list[Path]) -> Pixels:
    """`[M, 96, 96, 3]` from files stored channel by channel, each channel by columns."""
    parts = [
        np.memmap(file, np.uint8, "r").reshape(-1, 3, STL10_SIDE, STL10_SIDE) for file in files
    ]
    images = np.empty((sum(map(len, parts)), STL10_SIDE, STL10_SIDE, 3), np.uint8)
    first = 0
    for part in parts:
        # In pieces, so that 2.9 GB are never in memory twice.
        for at in range(0, len(part), 1000):
            piece = part[at : at + 1000]
            images[first + at : first + at + len(piece)] = piece.transpose(0, 3, 2, 1)
        first += len(part)
    return images


def stl10_labels(folder: Path, split: str) -> NDArray[np.int64]:
    """Labels from 0, one for each image of the split's file; they are stored from 1."""
    file = folder / f"{split}_y.bin"
    labels = np.fromfile(file, np.uint8).astype(np.int64) - 1
    images = (folder / f"{split}_X.bin").stat().st_size // (3 * STL10_SIDE**2)
    if len(labels) != images or labels.min() < 0 or labels.max() >= len(STL10_CLASSES):
        raise ValueError(
            f"data.root: {file} has {len(labels)} labels from {labels.min() + 1} to "
            f"{labels.max() + 1}; accepted: {images} labels from 1 to 10, one for each image of "
            f"{split}_X.bin"
        )
    return labels


# --- MedMNIST ------------------------------------------------------------------------------------

ORGANS = (
    *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver"),
    *("lung-left", "lung-right", "pancreas", "spleen"),
)
MEDMNIST: dict[str, tuple[str, tuple[str, ...]]] = {
    "blood": (
        "bloodmnist",
        (
            *("basophil", "eosinophil", "erythroblast", "immature granulocytes"),
            *("lymphocyte", "monocyte", "neutrophil", "platelet"),
        ),
    ),
    "organa": ("organamnist", ORGANS),
    "organc": ("organcmnist", ORGANS),
    "organs": ("organsmnist", ORGANS),
}
MEDMNIST_SIZES = ("", "_64", "_128", "_224")


def find_medmnist(data: Data) -> None:
    medmnist_file(data)


def medmnist_file(data: Data) -> Path:
    """The file to load: the smallest size there is; the benchmark's is 28 px."""
    stem = MEDMNIST[data.name][0]
    fetch = f"{prepare(data)} --download fetches it"
    root = root_of(data, f"data.name={data.name} looks for MedMNIST's {stem}.npz in it; {fetch}")
    for size in MEDMNIST_SIZES:
        if (root / f"{stem}{size}.npz").is_file():
            return root / f"{stem}{size}.npz"
    raise ValueError(
        f"data.root: {root} has no {stem}.npz, nor {stem}_64.npz, {stem}_128.npz or "
        f"{stem}_224.npz; {fetch}"
    )


def load_medmnist(data: Data) -> Dataset:
    """The test split is for validation, as in the papers; MedMNIST's own `val` is not used."""
    file, classes = medmnist_file(data), MEDMNIST[data.name][1]
    splits = []
    for split in ("train", "test"):
        images, labels = medmnist_arrays(file, split)
        labels = labels.reshape(len(labels), -1)
        fits = labels.shape == (len(images), 1) and len(labels) and labels.min() >= 0
        if not fits or labels.max() >= len(classes):
            raise ValueError(
                f"data.root: {file}, {split}_labels: expected {len(images)} numbers below "
                f"{len(classes)}, got an array of {list(labels.shape)}; another file's content?"
            )
        try:
            splits.append(Split.of_array(images, labels[:, 0].astype(np.int64)))
        except ValueError as error:
            raise ValueError(f"data.root: {file}, {split}_images: {error}") from None
    return Dataset(data.name, splits[0], splits[1], classes)


def medmnist_arrays(file: Path, split: str) -> tuple[Pixels, NDArray[np.int64]]:
    wanted = f"{split}_images", f"{split}_labels"
    with (
        refused(
            f"data.root: {file} is incomplete, damaged or not of MedMNIST",
            "accepted: its file, whole",
        ),
        np.load(file, allow_pickle=False) as arrays,
    ):
        if lacking := [name for name in wanted if name not in arrays]:
            raise ValueError(f"it has no {' and '.join(lacking)}")
        return arrays[wanted[0]], arrays[wanted[1]]


DEFINITIONS = {
    **{name: Definition(find_cifar, load_cifar) for name in CIFAR},
    "stl10": Definition(find_stl10, load_stl10),
    **{name: Definition(find_medmnist, load_medmnist) for name in MEDMNIST},
}
