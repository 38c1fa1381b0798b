"""Files that cannot be read as images, and where a loader meets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ddp_ssl.data.loading.order import permutation

IMAGES = 24


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(3000))


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-100])


def no_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def broken_tables(path: Path) -> None:
    """Begins and ends as a JPEG should: only decoding it finds this."""
    content = bytearray(path.read_bytes())
    content[30:300] = np.random.default_rng(0).bytes(270)
    path.write_bytes(content)


def gif(path: Path) -> None:
    Image.open(path).save(path, "GIF")


def cut_png(path: Path) -> None:
    Image.open(path).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-600])


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "random bytes": (garbage, "not an image"),
    "truncated": (halve, "truncated"),
    "no end marker": (no_end, "truncated"),
    "empty": (empty, "empty"),
    "a directory": (directory, "Is a directory"),
    "deleted": (Path.unlink, "No such file"),
    "broken tables": (broken_tables, ""),
    "gif": (gif, "GIF is not supported"),
    "cut png": (cut_png, ""),
}


def victim(step: int, place: int) -> int:
    """The image at a place of a step, in batches of six, in the order of `loader_of`."""
    return int(permutation(3, 0, IMAGES)[step * 6 + place])
