"""Tar files that others might have packed."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import webdataset

from ddp_ssl.config import Data
from ddp_ssl.data.datasets import registry

FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
Items = Iterable[tuple[str, bytes]]


def write_tar(path: Path, items: Items, form: int = tarfile.PAX_FORMAT) -> Path:
    """Members with these names and contents, by Python's tarfile; a folder's name ends with `/`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in items:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            if name.endswith("/"):
                about.type = tarfile.DIRTYPE
            tar.addfile(about, io.BytesIO(content))
    return path


def as_tars(folder: Path, out: Path, files: int = 2, form: int | None = None) -> Path:
    """The images of `folder`, of `train/` and `val/` or all, in their order.

    Keys are the names without extensions, `.cls` holds the names of the classes. By the writer of
    WebDataset itself, or as Python's tarfile packs folders in a format.
    """
    data = Data(name="folder", root=str(folder))
    made = registry.definition_of(data).load(data)
    out.mkdir(parents=True, exist_ok=True)
    for split, name in ((made.train, "train"), (made.val, "validation")):
        if split is None:
            continue
        samples = []
        for i in range(len(split)):
            key, extension = os.path.splitext(os.fsdecode(split.name(i)))
            kind = made.class_names[split.labels[i]]
            samples.append((key, extension[1:], Path(split.where(i)).read_bytes(), kind))
        for k in range(files):
            part = samples[k * len(split) // files : (k + 1) * len(split) // files]
            path = out / f"{name}-{k:06d}.tar"
            if form is None:
                with webdataset.TarWriter(str(path)) as writer:
                    for key, extension, content, kind in part:
                        writer.write({"__key__": key, extension: content, "cls": kind})
                continue
            items: list[tuple[str, bytes]] = [("./", b"")]
            for key, extension, content, kind in part:
                items += [(f"./{key}.{extension}", content), (f"./{key}.cls", kind.encode())]
            write_tar(path, items, form)
    return out
