"""Images in one's own arrays: `.npy` and `.npz` files with any number of channels.

An `.npy` file and an array that is stored uncompressed in an `.npz` are mapped: pages are read as
they are needed and are shared by the processes of a node. A compressed array is held in memory.
"""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.datasets.base import Dataset, Definition, absolute
from ddp_ssl.data.datasets.folders import TRAIN, VAL
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.errors import refused
from ddp_ssl.utils.once import warn_once

if TYPE_CHECKING:
    from ddp_ssl.config import Data

Array = NDArray[Any]
SUFFIXES = (".npz", ".npy")
IMAGES: tuple[str, ...] = ("x", "images", "image", "data", "img", "imgs", "arr_0")
LABELS: tuple[str, ...] = ("y", "labels", "label", "targets", "target", "ans", "arr_1")
TYPES = ("uint8", "uint16", "float32")
LAYOUT = (
    "accepted: arrays called x and y (or images and labels), alone or with train and val in their "
    "names; data.columns=[IMAGES, LABELS] names others"
)
SAMPLE = 1000  # images of which mean and standard deviation are computed, evenly spaced
SAMPLE_BYTES = 2**28


class Arrays(NamedTuple):
    """The arrays of a split; `labels` is None where there are none."""

    images: Array
    labels: Array | None


def is_place(root: Path) -> bool:
    """Whether a file, a folder or a split's folder in it holds arrays, by their names."""
    if not root.is_dir():
        return bool(files_of(root))
    splits = [path for path in root.iterdir() if path.name.lower() in TRAIN + VAL]
    places = [root, *filter(Path.is_dir, splits)]
    return any(path.suffix in SUFFIXES for place in places for path in place.iterdir())


def files_of(root: Path) -> list[Path]:
    """The files of arrays that are a place, or lie at any depth below it."""
    if root.is_dir():
        return sorted(root.rglob("*.np[yz]"))
    return [root] if root.suffix in SUFFIXES and root.is_file() else []


def find(data: Data) -> None:
    split_arrays(data)


def load(data: Data) -> Dataset:
    found = split_arrays(data)
    train, val = found["train"], found.get("val")
    known, labels = classes_of(data, train)
    made = Split.of_pixels(train.images, labels)
    held_out = None
    if val is not None:
        if val.images.shape[3] != train.images.shape[3] or val.images.dtype != train.images.dtype:
            raise ValueError(
                f"data.root: {data.root}: {_form(val.images)} to validate on, {_form(train.images)}"
                " to train on; the same channels and type are accepted"
            )
        held_out = Split.of_pixels(val.images, numbered(data, val, known))
    return Dataset("array", made, held_out, tuple(map(str, known)))


# --- which array is what -------------------------------------------------------------------------


def split_arrays(data: Data) -> dict[str, Arrays]:
    """The arrays of `train` and, if they are there, of `val`; raises `ValueError`."""
    if not data.root:
        raise ValueError(f"data.root: unset; data.name=array looks for .npz or .npy; {LAYOUT}")
    root = absolute(data.root)
    if not files_of(root):
        what = "has no .npz or .npy" if root.exists() else "does not exist"
        raise ValueError(f"data.root: {root} {what}; {LAYOUT}")
    images, labels = IMAGES, LABELS
    if data.columns:
        given = ["_".join(_words(name)) for name in data.columns]
        images, labels = tuple(given[:1]), tuple(given[1:])
    found: dict[tuple[str, str], tuple[str, Callable[[], Array]]] = {}
    unused = []
    for name, opened in arrays_in(root):
        split, kind = meaning(name, images, labels)
        if split == "test" or not kind:
            unused.append(name)
        elif (split, kind) in found:
            other = found[split, kind][0]
            raise ValueError(f"data.root: {root}: {other} and {name} are both {kind}; {LAYOUT}")
        else:
            found[split, kind] = name, opened
    if ("train", "images") not in found and len(unused) == 1 and not found and not data.columns:
        (name, opened), unused = next(iter(arrays_in(root))), []
        found["train", "images"] = name, opened
    if ("train", "images") not in found:
        names = ", ".join([name for name, _ in found.values()] + unused) or "none"
        raise ValueError(f"data.root: {root} has no images to train on (arrays: {names}); {LAYOUT}")
    if unused:
        warn_once(f"data.root: {root}: not used: {', '.join(unused)}")
    made = {}
    for split in ("train", "val"):
        if (split, "images") in found:
            name, opened = found[split, "images"]
            x = as_images(opened(), f"data.root: {root}: {name}")
            y = found[split, "labels"][1]() if (split, "labels") in found else None
            if y is not None and (y.ndim == 0 or len(y) != len(x)):
                raise ValueError(
                    f"data.root: {root}: {len(x)} images in {name}, labels of the shape "
                    f"{list(y.shape)}; one for each image is accepted"
                )
            made[split] = Arrays(x, y)
    return made


def meaning(name: str, images: tuple[str, ...], labels: tuple[str, ...]) -> tuple[str, str]:
    """The split and the kind (`images`, `labels` or empty) of an array, by its name."""
    words, split = _words(name), "train"
    for names, meant in ((TRAIN, "train"), (VAL, "val"), (("test", "testing"), "test")):
        inside = [word for word in words if word in names]
        if inside and "_".join(words) not in images + labels:  # no name that the user gave
            words.remove(inside[0])
            split = meant
            break
    rest = "_".join(words)
    return split, "images" if rest in images else "labels" if rest in labels else ""


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[/_.\- ]", name.lower()) if word]


def arrays_in(root: Path) -> Iterator[tuple[str, Callable[[], Array]]]:
    """The name of each array below `root` and what opens it; a file's name is a part of it."""
    if root.is_dir():
        for path in files_of(root):
            place = path.relative_to(root).with_suffix("").as_posix()
            yield from _arrays_of(path, place)
    else:
        yield from _arrays_of(root, "x" if root.suffix == ".npy" else "")


def _arrays_of(path: Path, place: str) -> Iterator[tuple[str, Callable[[], Array]]]:
    damaged = f"data.root: {path} is damaged or no array of numbers", "accepted: np.save's files"

    def mapped() -> Array:
        with refused(*damaged):
            made: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            return made

    if path.suffix == ".npy":
        yield place, mapped
        return
    with refused(*damaged), zipfile.ZipFile(path) as inside:
        members = [one for one in inside.infolist() if one.filename.endswith(".npy")]

    def of_member(one: zipfile.ZipInfo) -> Callable[[], Array]:
        def opened() -> Array:
            with refused(*damaged):
                return _member(path, one.filename, path.stat().st_mtime_ns)

        return opened

    for one in members:
        yield f"{place}/{one.filename[:-4]}".lstrip("/"), of_member(one)


@functools.lru_cache(maxsize=8)
def _member(path: Path, member: str, modified: int) -> Array:
    """An array of an `.npz` of that time, mapped if it is stored as it is, else read once."""
    with zipfile.ZipFile(path) as inside:
        one = inside.getinfo(member)
    if one.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(one.header_offset + 26)  # the local header's lengths of name and extra field
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            file.seek(one.header_offset + 30 + name + extra)
            form: Any = np.lib.format
            version = form.read_magic(file)[0]
            read = getattr(form, f"read_array_header_{version}_0")
            shape, fortran, kind = read(file)
            if not kind.hasobject and not fortran and np.prod(shape):
                return np.memmap(path, kind, "r", file.tell(), shape)
    with np.load(path, allow_pickle=False) as arrays:
        made: Array = arrays[member[:-4]]
        return made


def as_images(x: Array, where: str) -> Array:
    """`[M, H, W, C]`, a view, of `[M, H, W]`, `[M, H, W, C]` or `[M, C, H, W]`."""
    if str(x.dtype) not in TYPES:
        raise ValueError(f"{where}: numbers of {x.dtype}; accepted: {', '.join(TYPES)}")
    if x.ndim not in (3, 4) or not x.size:
        raise ValueError(
            f"{where}: an array of {list(x.shape)}; accepted: [M, H, W], [M, H, W, C] or "
            "[M, C, H, W]"
        )
    if x.ndim == 3:
        return x[..., None]
    _, a, b, c = x.shape
    last, first = a == b != c, b == c != a  # square images
    if last == first:
        last, first = c < min(a, b), a < min(b, c)
    if last == first:
        raise ValueError(
            f"{where}: an array of {list(x.shape)}: its channels cannot be told from its sides; "
            "accepted: fewer channels than pixels a side, first or last"
        )
    return x if last else x.transpose(0, 2, 3, 1)


def has_colours(channels: int, dtype: str) -> bool:
    """Whether colours can be changed: bytes of one or three channels."""
    return channels in (1, 3) and dtype == "uint8"


def _form(images: Array) -> str:
    return f"{images.shape[3]} channels of {images.dtype}"


# --- labels --------------------------------------------------------------------------------------


def classes_of(data: Data, arrays: Arrays) -> tuple[list[Any], NDArray[np.int64]]:
    """The classes, sorted, and the number of each image's; -1 and empty text are unlabelled."""
    values = _values(data, arrays)
    if values is None:
        return [], np.full(len(arrays.images), -1)
    known = [value for value in np.unique(values).tolist() if value not in (-1, "")]
    return known, numbered(data, arrays, known)


def numbered(data: Data, arrays: Arrays, known: list[Any]) -> NDArray[np.int64]:
    """The number of each image's class among those that are `known`."""
    values = _values(data, arrays)
    if values is None or not known:
        return np.full(len(arrays.images), -1)
    number = {value: i for i, value in enumerate(known)} | {-1: -1, "": -1}
    if other := [value for value in np.unique(values).tolist() if value not in number]:
        raise ValueError(
            f"data.root: {data.root}: {other[0]!r} is a class of the validation images alone; "
            f"accepted: the {len(known)} of the training images"
        )
    return np.array([number[value] for value in values.tolist()], np.int64)


def _values(data: Data, arrays: Arrays) -> Array | None:
    """One whole number or text an image; None, said once, where labels are something else."""
    y = arrays.labels
    if y is None:
        return None
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "buif":
        ones = y == 1
        if ((y == 0) | ones).all() and (ones.sum(1) == 1).all():  # one of L
            return np.asarray(ones.argmax(1))
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim == 1 and y.dtype.kind in "buiUS":
        return y.astype(np.int64) if y.dtype.kind in "bui" else y.astype(np.str_)
    if y.ndim == 1 and y.dtype.kind == "f" and (y == np.rint(y)).all():
        return y.astype(np.int64)
    what = "a mask for each image" if y.ndim > 2 else "several labels an image"
    what = "numbers that are no classes" if y.ndim == 1 else what
    warn_once(
        f"data.root: {data.root}: labels {list(y.shape)} of {y.dtype}: {what}; pretraining needs "
        "none, k-NN and the probe do without"
    )
    return None


# --- statistics ----------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What the images of an array are. Mean and deviation per channel: bytes from 0 to 1."""

    images: int
    side: int
    channels: int
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sampled: int


def facts(data: Data) -> Facts:
    """Computed from the first images of the data set, evenly spaced; the same in every process."""
    x = split_arrays(data)["train"].images
    most = max(16, SAMPLE_BYTES // max(x[0].nbytes, 1))
    ids = np.unique(np.linspace(0, len(x) - 1, min(len(x), SAMPLE, most)).astype(np.int64))
    total = np.zeros((2, x.shape[3]))
    unit = 255.0 if x.dtype == np.uint8 else 1.0
    for i in ids:
        pixels = np.asarray(x[i], np.float64).reshape(-1, x.shape[3]) / unit
        total += pixels.mean(0), np.square(pixels).mean(0)
    mean, square = total / len(ids)
    if not np.isfinite(total).all():
        raise ValueError(
            f"data.root: {data.root}: some values are not finite; numbers are accepted"
        )
    std = np.sqrt(np.maximum(square - mean**2, 0))
    constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-12)
    if constant.any():
        warn_once(f"data.root: {data.root}: constant channels: {np.flatnonzero(constant).tolist()}")
    std[constant] = 1.0
    rounded = [tuple(float(f"{v:.6g}") for v in values) for values in (mean, std)]
    side = round(float(np.sqrt(x.shape[1] * x.shape[2])))
    return Facts(len(x), side, x.shape[3], str(x.dtype), rounded[0], rounded[1], len(ids))


DEFINITIONS = {"array": Definition(find, load)}
