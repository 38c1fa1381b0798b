"""Which images a folder holds, and their classes. numpy only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddp_ssl.data.manifest import Names, Split

# What DALI decodes on every machine. GIF and AVIF, which it does not, are no images here.
EXTENSIONS = frozenset(
    (b".jpg", b".jpeg", b".png", b".bmp", b".webp", b".tif", b".tiff", b".ppm", b".pgm", b".jp2")
)


def images_below(folder: Path, only: Sequence[str] | None = None) -> tuple[Split, tuple[str, ...]]:
    """The images of a folder and the names of its class folders, of which labels are the indices.

    A folder in it that holds images, at any depth, is a class; the order is by name. Without one
    the folder is flat and its images are unlabelled. `only` names the class folders to look into.
    """
    names, counts = Names(), []
    found: list[str] = []
    top = os.fsencode(folder)
    for entry in entries(top):
        if not entry.is_dir() or (only is not None and os.fsdecode(entry.name) not in only):
            continue
        before = len(names)
        for name in scan(top, entry.name + b"/"):
            names.append(name)
        if len(names) > before:
            found.append(os.fsdecode(entry.name))
            counts.append(len(names) - before)
    if not found and only is None:
        for name in scan(top):
            names.append(name)
        return Split.of_files(str(folder), names, np.full(len(names), -1)), ()
    labels = np.repeat(np.arange(len(found)), counts)
    return Split.of_files(str(folder), names, labels), tuple(found)


def scan(folder: bytes, at: bytes = b"") -> Iterator[bytes]:
    """Paths, relative to `folder`, of all images below it, in one order on every machine.

    By name within a folder. Hidden files and folders, other extensions, links that lead nowhere and
    links back up are passed over. `at` is the part to scan, empty or ending in a slash.
    """
    for entry in entries(os.path.join(folder, at)):
        if entry.is_dir():
            if not _leads_up(entry):
                yield from scan(folder, at + entry.name + b"/")
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
            yield at + entry.name


def entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    """What is in a folder and not hidden, by name."""
    with os.scandir(folder) as found:
        return sorted(
            (entry for entry in found if not entry.name.startswith(b".")), key=lambda e: e.name
        )


def _leads_up(entry: os.DirEntry[bytes]) -> bool:
    """Whether this is a link to a folder that it is in, which would never end."""
    if not entry.is_symlink():
        return False
    inside = os.path.join(os.path.realpath(os.path.dirname(entry.path)), b"")
    return inside.startswith(os.path.join(os.path.realpath(entry.path), b""))
