"""scikit-learn's handwritten digits, the data of the embedded default config."""

from __future__ import annotations

import io
import logging
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddp_ssl.data.datasets.base import Dataset, Definition
from ddp_ssl.data.datasets.cache import cache_folder, write_atomically
from ddp_ssl.data.datasets.folders import train_and_val
from ddp_ssl.utils.sealed import CHECKSUM
from ddp_ssl.utils.seeds import generator

if TYPE_CHECKING:
    from ddp_ssl.config import Data


logger = logging.getLogger("ddp_ssl")


def find(data: Data) -> None:
    if data.root:
        # A given root means other images than those of the embedded default.
        raise ValueError(
            f"data.root: {data.root} is not used by data.name=digits, which is a part of "
            "scikit-learn; leave it out, or name its content (data.name=folder for images)"
        )
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        raise ValueError(
            "data.name: digits is a part of scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from None


def load(data: Data) -> Dataset:
    """1,797 digits of 8x8, upscaled to 32x32 JPEGs in class folders, a stratified fifth for val."""
    folder = cache_folder() / "digits-32-v1"
    if not is_whole(folder):
        there = folder.is_dir()
        if there:
            logger.warning("%s is damaged or of an earlier version: written again", folder)
        try:
            write_atomically(folder, write, outdated=lambda: not is_whole(folder))
        except OSError as error:
            if there and not (folder / CHECKSUM).exists():  # a read-only one of an earlier version
                logger.warning("%s cannot be written: used as it is", folder)
                return train_and_val("digits", folder / "train", folder / "val")
            raise ValueError(
                f"DDP_SSL_CACHE: cannot write {folder}: {error.strerror}; accepted: a folder to "
                "write the digits to, once"
            ) from None
    return train_and_val("digits", folder / "train", folder / "val")


def is_whole(folder: Path) -> bool:
    """Whether the files are those that `write` made."""
    try:
        return (folder / CHECKSUM).read_bytes() == files_checksum(folder).encode()
    except OSError:
        return False


def files_checksum(folder: Path) -> str:
    """CRC-32 of the images and their names; raises `OSError`."""
    value = 0
    for path in sorted(folder.glob("*/*/*.jpg")):
        value = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), value))
    return str(value)


def write(folder: Path) -> None:
    """Write the images, and a checksum of them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    # The seed is fixed, because all runs share these files.
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
    (folder / CHECKSUM).write_text(files_checksum(folder))


DEFINITIONS = {"digits": Definition(find, load)}
