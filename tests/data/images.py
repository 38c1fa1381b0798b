"""Pictures, splits and loaders for the tests of this folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddp_ssl.commands import pack_shards
from ddp_ssl.config.views import CentralCrop, View
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.formats import Decoding, PixelFormat
from ddp_ssl.data.loading.loader import EvalLoader, TrainLoader
from ddp_ssl.data.loading.order import Order
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings

Pixels = NDArray[np.uint8]
HALF = (0.5, 0.5, 0.5)


def picture(index: int, height: int = 40, width: int = 48) -> Pixels:
    """Smooth colours with edges, another for each index; uint8 `[H, W, 3]`."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).copy()
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return pixels


def write(path: Path, index: int = 0, **shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(index, **shape)).save(path)
    return path


def pack(root: Path, out: Path, *changes: str, size: int = 20_000, seed: int = 0) -> int:
    """Pack a folder into shards of `size` bytes, a few pictures each; the command's exit code."""
    options = ["--out", str(out), "--shard-size", str(size), "--seed", str(seed), "--workers", "3"]
    return pack_shards.main([*options, "data.name=folder", f"data.root={root}", *changes])


def folder_of(root: Path, count: int) -> Split:
    """`count` JPEGs of different sizes, labelled by their index."""
    names = []
    for i in range(count):
        write(root / f"{i:03d}.jpg", i, height=24 + i % 5, width=30 - i % 7)
        names.append(f"{i:03d}.jpg".encode())
    return Split.of_files(str(root), names, np.arange(count))


def array_of(count: int, size: int = 20) -> Split:
    return Split.of_array(
        np.stack([picture(i, size, size) for i in range(count)]), np.arange(count)
    )


def loader_of(split: Split, views: list[View] | None = None, **changes: Any) -> TrainLoader:
    """A loader of two small views that use every operator."""
    if views is None:
        views = [
            View(size=16, solarize_p=0.3, vertical_flip_p=0.5, rotate=90),
            View(size=8, blur_p=0.1, rotate=20),
        ]
    grouped = grouped_settings(split, views, changes)
    return TrainLoader(split, *grouped, **changes)


def grouped_settings(
    split: Split, views: list[View], changes: dict[str, Any]
) -> tuple[Order, Augmentation, LoaderSettings]:
    """A loader's groups of settings with some changed, which are taken out of `changes`."""
    changed = changes.pop
    order = Order(
        len(split), changed("global_batch", 6), changed("shard", 0), changed("num_shards", 1),
        changed("seed", 3),
    )  # fmt: skip
    augmentation = Augmentation(
        views, changed("color_jitter", "seq"), changed("salt", 0), changed("view_ids", None)
    )
    return order, augmentation, loader_settings(changes)


def loader_settings(changes: dict[str, Any]) -> LoaderSettings:
    """One thread on a CPU, with some settings changed, which are taken out of `changes`."""
    changed = changes.pop
    mean, std, half = changed("mean", HALF), changed("std", HALF), changed("half", False)
    return LoaderSettings(
        PixelFormat(mean, std, half), changed("device", torch.device("cpu")),
        changed("threads", 1), changed("prefetch", 2), changed("decoding", Decoding()),
    )  # fmt: skip


def same(a: Batch, b: Batch) -> bool:
    views = zip(a.views, b.views, strict=True)
    return torch.equal(a.ids, b.ids) and all(torch.equal(x, y) for x, y in views)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def eval_of(split: Split, ids: Any, shard: int = 0, shards: int = 1, **changes: Any) -> EvalLoader:
    crop, settings = changes.pop("crop", CentralCrop(16, 16)), loader_settings(changes)
    share = {"batch_size": 4, "shard": shard, "num_shards": shards} | changes
    return EvalLoader(split, ids, crop, settings, **share)
