"""Speed of the data path beside torchvision's: `python tools/bench/data.py`.

Three settings, or one with `--size` and `--views`: two 224-pixel views of 500 x 375 JPEGs (recipe
`asym`), 2 x 224 + 6 x 96, and two 32-pixel views of an array. The contestants take turns within one
process: `TrainLoader` with `--workers` threads, and torchvision's `DataLoader` with as many worker
processes, with PIL images and with tensors (transforms v2, `torchvision.io.decode_jpeg`). Most of
torchvision's time is its Gaussian blur, so PIL's own, which many recipes take, competes as well.

The figure to compare is processor time per image, children included, from idle to idle: other work
on the machine disturbs it little. Images per second are of the wall clock, between the first batch
and the last.

`--open-latency 2` measures reading instead. A small library, made with the C compiler and
preloaded, makes every `open` of an image 2 ms longer, as on a network file system. The contestants
are then DALI's own `fn.readers.file` before the same graph, and the same images in shards.

`--latency 20` reads shards, tar files and parquet files from a web server, a process of its own,
that answers each request 20 ms later, beside the same files on the disk.

`--containers` compares the same images in folders, in shards, in tar files as WebDataset's writer
packs them and in parquet files as `datasets` writes them: the loader with one crop, reading alone,
and the bytes read for each byte of an image.
"""

import argparse
import gc
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torchvision
from compare import spread
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from slow_store import serving
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2

from ddp_ssl.commands import pack_shards
from ddp_ssl.config import Data
from ddp_ssl.config.views import RECIPES, View
from ddp_ssl.data.datasets import parquet, registry, remote, webdataset
from ddp_ssl.data.datasets.shards import open_shards
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading import dali
from ddp_ssl.data.loading.formats import Decoding, PixelFormat
from ddp_ssl.data.loading.loader import TrainLoader
from ddp_ssl.data.loading.order import Order
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings

Pixels = NDArray[np.uint8]
FORM = PixelFormat((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PREFETCH = 2
LATENCY = "DDP_SSL_OPEN_LATENCY_US"  # read by the preloaded library at every open

OURS, PIL, TENSOR = "ddp_ssl", "torchvision, PIL", "torchvision, tensors"
PIL_BLUR = "torchvision, PIL, blur of PIL's own"
READER = "fn.readers.file"
INDEXED, FAR = "ddp_ssl, shards", "from afar"


class Run(NamedTuple):
    """One contestant's turn."""

    ms: float  # processor time per image
    rate: float  # images per second of the wall clock


Contestant = Callable[[int], Run]  # takes the number of images of a turn


def picture(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Noise of several octaves, with ellipses on it: the spectrum and the edges of photographs."""
    image = np.tile(rng.uniform(80, 160, 3), (height, width, 1))
    for octave in range(1, 10):
        cells = (min(2**octave, height), min(2**octave, width))
        strength = 64 * 0.82**octave
        common, own = rng.normal(size=(*cells, 1)), rng.normal(size=(*cells, 3))
        for channel, layer in enumerate(np.moveaxis(0.8 * common + 0.35 * own, 2, 0)):
            smooth = Image.fromarray(layer.astype(np.float32)).resize((width, height), 3)
            image[..., channel] += strength * np.asarray(smooth)
    y, x = np.mgrid[:height, :width]
    for _ in range(6):
        center_y, center_x = rng.uniform(0, height), rng.uniform(0, width)
        radius_y, radius_x = rng.uniform(0.05, 0.33) * height, rng.uniform(0.05, 0.33) * width
        inside = ((y - center_y) / radius_y) ** 2 + ((x - center_x) / radius_x) ** 2 < 1
        image[inside] = 0.6 * image[inside] + 0.4 * rng.uniform(0, 255, 3)
    return image.clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, count: int, height: int, width: int) -> float:
    """JPEGs of quality 90, one in five upright; returns their mean size in kB."""
    rng, total = np.random.default_rng(0), 0
    for i in range(count):
        shape = (width, height) if rng.random() < 0.2 else (height, width)
        path = folder / f"{i:06d}.jpg"
        Image.fromarray(picture(rng, *shape)).save(path, quality=90)
        total += path.stat().st_size
    return total / count / 1000


def small_pictures(count: int) -> Pixels:
    """uint8 `[count, 32, 32, 3]`, cut from larger ones."""
    rng = np.random.default_rng(0)
    large = [picture(rng, 256, 256) for _ in range(16)]
    places = rng.integers(0, 224, (count, 2))
    return np.stack([large[i % 16][y : y + 32, x : x + 32] for i, (y, x) in enumerate(places)])


def package(
    split: Split,
    views: Sequence[View],
    batch: int,
    workers: int,
    mode: str,
    read_threads: int = 16,
) -> Contestant:
    loader = TrainLoader(
        split,
        Order(len(split), batch, shard=0, num_shards=1, seed=0),
        Augmentation(views, mode),
        LoaderSettings(FORM, torch.device("cpu"), workers, PREFETCH, read_threads=read_threads),
    )
    return endless(loader, batch)


def dali_reader(folder: Path, views: Sequence[View], batch: int, workers: int) -> Contestant:
    """The same graph behind DALI's own reader of files."""
    files = sorted(str(path) for path in folder.glob("*.jpg"))

    def reading() -> tuple[Any, Any]:
        encoded, ids = dali.fn.readers.file(files=files, random_shuffle=True, name="files")
        return dali.decode(encoded, Decoding()), ids

    batches = dali.train_iterator(
        reading,
        Augmentation(views, "seq"),
        LoaderSettings(FORM, torch.device("cpu"), workers, PREFETCH),
        seed=0,
        batch_size=batch,
    )
    return endless(batches, batch)


def endless(batches: Iterator[Any], batch: int) -> Contestant:
    """Turns of an iterator that works ahead: each begins and ends with full queues."""
    next(batches)

    def turn(images: int) -> Run:
        steps = max(1, images // batch)
        standstill()
        cpu = cpu_seconds()
        for _ in range(PREFETCH + 1):  # until the queues are no longer ahead
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        seconds = time.perf_counter() - start
        standstill()
        made = (steps + PREFETCH + 1) * batch
        return Run(1000 * (cpu_seconds() - cpu) / made, steps * batch / seconds)

    return turn


def standstill() -> None:
    """Until this process has used no more than a tenth of a core for a while."""
    used = 1.0
    while used > 0.005:
        before = cpu_seconds()
        time.sleep(0.05)
        used = cpu_seconds() - before


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class PilBlur:
    """A Gaussian out of box filters, much cheaper than torchvision's; many recipes take it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*self.sigma).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))


def compose(view: View, module: Any, pil_blur: bool = False) -> Any:
    """A view as torchvision's transforms, of `transforms` (PIL) or `transforms.v2` (tensors)."""
    steps = [
        module.RandomResizedCrop(
            view.size,
            scale=view.scale,
            ratio=view.ratio,
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
    ]
    if view.jitter_p > 0:
        jitter = module.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps.append(module.RandomApply([jitter], view.jitter_p))
    if view.gray_p > 0:
        steps.append(module.RandomGrayscale(view.gray_p))
    if view.blur_p > 0:
        window = 2 * (view.size // 20) + 1  # a tenth of the side: 23 for 224, 9 for 96
        exact = module.GaussianBlur(window, view.blur_sigma)
        blur = PilBlur(view.blur_sigma) if pil_blur else exact
        steps.append(module.RandomApply([blur], view.blur_p))
    if view.solarize_p > 0:
        steps.append(module.RandomSolarize(128, view.solarize_p))
    if view.flip_p > 0:
        steps.append(module.RandomHorizontalFlip(view.flip_p))
    if module is v1:
        steps.append(v1.ToTensor())
    else:
        steps.append(v2.ToDtype(torch.float32, scale=True))
    return module.Compose([*steps, module.Normalize(list(FORM.mean), list(FORM.std))])


class Views(Dataset[tuple[list[torch.Tensor], int]]):
    """The views of files or of pixels uint8 `[M, H, W, 3]`, as PIL images or as tensors."""

    def __init__(
        self,
        source: list[str] | Pixels,
        views: Sequence[View],
        module: Any,
        pil_blur: bool = False,
    ) -> None:
        self.source, self.pil = source, module is v1
        self.transforms = [compose(view, module, pil_blur) for view in views]
        if not self.pil and not isinstance(source, list):
            self.tensors = torch.from_numpy(source).permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[list[torch.Tensor], int]:
        source: Any = self.source[i]
        if isinstance(source, str):
            image = (
                Image.open(source).convert("RGB")
                if self.pil
                else decode_jpeg(read_file(source), mode=ImageReadMode.RGB)
            )
        else:
            image = Image.fromarray(source) if self.pil else self.tensors[i]
        return [transform(image) for transform in self.transforms], i


def data_loader(dataset: Views, batch: int, workers: int) -> Contestant:
    """Turns of a `DataLoader`, each with worker processes of its own, whose start is not timed."""

    def turn(images: int) -> Run:
        steps = max(workers + 1, images // batch)
        ids = np.resize(np.random.default_rng(1).permutation(len(dataset)), steps * batch)
        loader = DataLoader(
            Subset(dataset, ids.tolist()), batch, shuffle=True, num_workers=workers, drop_last=True
        )
        standstill()
        cpu, start = cpu_seconds(), 0.0
        for _ in loader:
            start = start or time.perf_counter()
        seconds = time.perf_counter() - start
        del loader
        gc.collect()  # ends the workers, whose time counts from then on
        standstill()
        # When the first batch came, each worker had made one, or nearly.
        return Run(1000 * (cpu_seconds() - cpu) / len(ids), (steps - workers) * batch / seconds)

    return turn


def settings(size: int | None, views: str | None) -> list[tuple[str, list[View]]]:
    """The settings asked for: a title and the views of each."""
    large = list(RECIPES["asym"])
    local = [replace(view, size=96, scale=(0.05, 0.14)) for view in large]
    small = replace(RECIPES["weak"][0], size=32, scale=(0.2, 1.0), blur_p=0.0)
    named = {
        (224, "2"): ("2 views of 224 px", [replace(v, scale=(0.08, 1.0)) for v in large]),
        (224, "2+6"): ("2 views of 224 px and 6 of 96 px", large + 3 * local),
        (32, "2"): ("2 views of 32 px, from an array, no blur", [small, small]),
    }
    return [
        setting
        for (its_size, its_views), setting in named.items()
        if size in (None, its_size) and views in (None, its_views)
    ]


def measure(contestants: dict[str, Contestant], images: int, repeats: int) -> dict[str, list[Run]]:
    """`repeats` turns of each, in turn."""
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, turn in contestants.items():
            runs[name].append(turn(images))
            print(f"  {name}: {runs[name][-1].ms:.3f} ms, {runs[name][-1].rate:.0f} images/s",
                  file=sys.stderr)  # fmt: skip
    return runs


def table(title: str, runs: dict[str, list[Run]], views: int) -> str:
    """Medians and ranges; the last two columns compare with the first contestant."""
    lines = [
        f"### {title}",
        "",
        "| | CPU-ms/image (range) | images/s per core | views/s per core | images/s (range) "
        "| times the CPU time | times as slow |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = next(iter(runs.values()))
    cost, speed = (
        statistics.median([r.ms for r in first]),
        statistics.median([r.rate for r in first]),
    )
    for name, turns in runs.items():
        ms, rate = [run.ms for run in turns], [run.rate for run in turns]
        per_core = 1000 / statistics.median(ms)
        cells = [
            name,
            spread(ms, 3 if statistics.median(ms) < 2 else 2),
            f"{per_core:,.0f}",
            f"{views * per_core:,.0f}",
            spread(rate, 0),
            f"{statistics.median(ms) / cost:.2f}",
            f"{speed / statistics.median(rate):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def augmentations(args: argparse.Namespace) -> Iterator[str]:
    """A table for each setting."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, kilobytes = Path(temporary), 0.0
        for title, views in settings(args.size, args.views):
            if views[0].size == 32:
                pixels = small_pictures(10_000)
                split, batch, images = Split.of_array(pixels), 256, args.images or 5120
                source: list[str] | Pixels = pixels
            else:
                if not kilobytes:
                    kilobytes = write_pictures(folder, 256, 375, 500)
                split, source = split_of(folder), [str(path) for path in sorted(folder.iterdir())]
                batch, images = 32, args.images or 256
                title += f", JPEGs of 500 × 375 and {kilobytes:.0f} kB"
            print(title, file=sys.stderr)
            contestants = {
                OURS: package(split, views, batch, args.workers, args.color_jitter),
                PIL: data_loader(Views(source, views, v1), batch, args.workers),
                TENSOR: data_loader(Views(source, views, v2), batch, args.workers),
            }
            if any(view.blur_p for view in views):
                cheaper = Views(source, views, v1, pil_blur=True)
                contestants[PIL_BLUR] = data_loader(cheaper, batch, args.workers)
            runs = measure(contestants, images, args.repeats)
            yield table(title, runs, len(views))


def split_of(folder: Path) -> Split:
    names = sorted(os.fsencode(path.name) for path in folder.iterdir())
    return Split.of_files(str(folder), names, np.zeros(len(names), np.int64))


PARQUET = "ddp_ssl, parquet"
TARS = "ddp_ssl, tar files of others"


def write_parquet(folder: Path, out: Path, codec: str = "snappy") -> None:
    """The images of a folder in the schema and the row groups of `datasets`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(folder.glob("*.jpg"))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    out.mkdir()
    for first in range(0, len(paths), 1000):
        some = paths[first : first + 1000]
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in some]
        tables = pa.table({"image": pa.array(cells, kind)})
        name = out / f"train-{first // 1000:05d}.parquet"
        pq.write_table(tables, name, compression=codec, row_group_size=100)


def write_tars(folder: Path, out: Path) -> None:
    """The images of a folder as the writer of WebDataset packs them."""
    from webdataset import ShardWriter

    out.mkdir()
    with ShardWriter(f"{out}/train-%05d.tar", maxcount=1000, verbose=0) as writer:
        for path in sorted(folder.glob("*.jpg")):
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": 0})


def containers(args: argparse.Namespace) -> Iterator[str]:
    """A table of the loader, and one of reading alone."""
    view = View(size=224, jitter_p=0, gray_p=0, blur_p=0)
    batch, images = 64, args.images or 1024
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["DDP_SSL_CACHE"] = str(Path(temporary, "cache"))
        folder = Path(temporary, "files")
        folder.mkdir()
        kilobytes = write_pictures(folder, 256, 375, 500)
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            for copy in range(7):  # each with another comment: parquet stores equal values once
                comment = b"\xff\xfe\x00\x03" + bytes([copy])
                (folder / f"{path.stem}-{copy:02d}.jpg").write_bytes(
                    content[:2] + comment + content[2:]
                )
        packing = ["--out", f"{temporary}/shards", "--shard-size", "1e8", "data.name=folder"]
        if pack_shards.main([*packing, f"data.root={folder}"]):
            raise RuntimeError("packing failed")
        splits = {INDEXED: open_shards(Path(temporary, "shards")).train, OURS: split_of(folder)}
        write_tars(folder, Path(temporary, "tars"))
        for codec in ("tars", "snappy", "none", "zstd"):
            kind: Any = webdataset.CONTAINER if codec == "tars" else parquet.CONTAINER
            if codec != "tars":
                write_parquet(folder, Path(temporary, codec), codec)
            cpu, before = cpu_seconds(), read_bytes()
            split = kind.load(Data(name=kind.name, root=f"{temporary}/{codec}")).train
            assert split.shards is not None
            size = int(split.shards.size.sum())
            cost, reads = (cpu_seconds() - cpu) / (1e-9 * size), (read_bytes() - before) / size
            print(
                f"{codec}: read through once, {cost:.1f} CPU-s a GB, {reads:.3f} bytes for each "
                "byte of an image",
                file=sys.stderr,
            )
            splits[TARS if codec == "tars" else f"{PARQUET}, {codec}"] = split
        title = f"Containers: one crop of 224 px, JPEGs of 500 × 375 and {kilobytes:.0f} kB"
        loaders = {
            name: package(split, [view], batch, args.workers, "seq")
            for name, split in splits.items()
            if "zstd" not in name
        }
        yield table(title, measure(loaders, images, args.repeats), 1)
        yield reading(splits, args.repeats)


def from_a_server(args: argparse.Namespace) -> Iterator[str]:
    """A table of the loader on files of this disk and on those of a server that is far."""
    view = View(size=224, jitter_p=0, gray_p=0, blur_p=0)
    batch, images = 64, args.images or 1024
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["DDP_SSL_CACHE"] = str(Path(temporary, "cache"))
        folder, there = Path(temporary, "files"), Path(temporary, "there")
        folder.mkdir()
        kilobytes = write_pictures(folder, args.pictures, 375, 500)
        packing = ["--out", f"{there}/shards", "--shard-size", "1e7", "data.name=folder"]
        if pack_shards.main([*packing, f"data.root={folder}"]):
            raise RuntimeError("packing failed")
        write_tars(folder, there / "tars")
        write_parquet(folder, there / "tables", "snappy")
        tars, tables = (f"{name}/train-{{00000..00000}}" for name in ("tars", "tables"))
        with serving(there, args.latency / 1000) as url:
            roots = {
                INDEXED: ("folder", f"{there}/shards"),
                f"{INDEXED}, {FAR}": ("folder", f"{url}/shards"),
                TARS: ("webdataset", f"{there}/{tars}.tar"),
                f"{TARS}, {FAR}": ("webdataset", f"{url}/{tars}.tar"),
                PARQUET: ("parquet", f"{there}/{tables}.parquet"),
                f"{PARQUET}, {FAR}": ("parquet", f"{url}/{tables}.parquet"),
            }
            contestants: dict[str, Contestant] = {}
            read = [
                "| | images/s, reading alone, `data.read_threads` | bytes asked for each byte |",
                "| --- | --- | --- |",
            ]
            for name, (kind, root) in roots.items():
                data = Data(name=kind, root=root)
                split = registry.load(data, 0).train
                asked: list[int] = []
                with (
                    patch.object(remote, "read", counting(remote.read, asked)),
                    ThreadPoolExecutor(data.readers) as pool,
                ):
                    list(pool.map(split.read, range(len(split))))  # connections and buffers
                    asked.clear()
                    start = time.perf_counter()
                    size = sum(pool.map(lambda i, s=split: len(s.read(i)), range(len(split))))
                    rate = len(split) / (time.perf_counter() - start)
                ratio = f"{sum(asked) / size:.3f}" if asked else "-"
                read.append(f"| {name} | {rate:,.0f} | {ratio} |")
                contestants[name] = package(split, [view], batch, args.workers, "seq", data.readers)
            title = f"A server {args.latency:g} ms away: 224 px, 500 × 375 and {kilobytes:.0f} kB"
            yield table(title, measure(contestants, images, args.repeats), 1)
            yield "\n".join(read)


def counting(read: Callable[..., Any], asked: list[int]) -> Callable[..., Any]:
    def counted(place: str, at: int, count: int, tag: str | None = None) -> Any:
        asked.append(count)
        return read(place, at, count, tag)

    return counted


def reading(splits: dict[str, Split], repeats: int) -> str:
    """Reading each image once in a random order, in this thread, from the kernel's memory."""
    ms: dict[str, list[float]] = {name: [] for name in splits}
    for turn in range(repeats):
        order = np.random.default_rng(turn).permutation(len(next(iter(splits.values()))))
        for name, split in splits.items():
            start = time.perf_counter()
            for i in order.tolist():
                split.read(i)
            ms[name].append(1000 * (time.perf_counter() - start) / len(order))
    lines = ["| | ms/image (range) | bytes read for each byte of an image |", "| --- | --- | --- |"]
    for name, split in splits.items():
        before = read_bytes()
        size = sum(len(split.read(i)) for i in range(len(split)))
        lines.append(f"| {name} | {spread(ms[name], 3)} | {(read_bytes() - before) / size:.3f} |")
    return "\n".join(lines)


def read_bytes() -> int:
    """Bytes that this process has asked files for."""
    return int(Path("/proc/self/io").read_text().split()[1])


# fopen's own call of open stays inside the C library, so it is wrapped too.
SLOW_OPEN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void wait_for(const char *path) {
  size_t n = path ? strlen(path) : 0;
  const char *us = getenv("DDP_SSL_OPEN_LATENCY_US");
  if (us && n > 4 && !strcmp(path + n - 4, ".jpg")) usleep(atoi(us));
}
#define MODE(last) \
  va_list list; va_start(list, last); int mode = va_arg(list, int); va_end(list);
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    MODE(flags) wait_for(path); \
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode); }
#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    MODE(flags) wait_for(path); \
    return ((int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name))(at, path, flags, mode); }
#define FOPEN(name) \
  FILE *name(const char *path, const char *how) { \
    wait_for(path); \
    return ((FILE *(*)(const char *, const char *))dlsym(RTLD_NEXT, #name))(path, how); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)
"""


def slow_opens(args: argparse.Namespace) -> Iterator[str]:
    """A table without and one with the latency; runs this command again with the library."""
    if LATENCY not in os.environ:
        with tempfile.TemporaryDirectory() as temporary:
            library = Path(temporary, "slow_open.so")
            compiler = os.environ.get("CC", "cc")
            how = ["-shared", "-fPIC", "-O1", "-x", "c", "-", "-ldl", "-o", str(library)]
            subprocess.run([compiler, *how], input=SLOW_OPEN.encode(), check=True)
            added = {"LD_PRELOAD": str(library), LATENCY: "0"}
            again = [sys.executable, *sys.argv]
            subprocess.run(again, env=os.environ | added, check=True)
        return
    view = View(size=32, jitter_p=0, gray_p=0, blur_p=0)
    batch, images = 64, args.images or 1024
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryDirectory() as elsewhere:
        folder = Path(temporary)
        kilobytes = write_pictures(folder, 256, 96, 128)
        # DALI's reader does not open what is still in its buffer of 1,024 images.
        for path in sorted(folder.iterdir()):
            for copy in range(31):
                shutil.copyfile(path, folder / f"{path.stem}-{copy:02d}.jpg")
        shards = Path(elsewhere)
        packing = ["--out", str(shards), "--shard-size", "1e7", "data.name=folder"]
        if pack_shards.main([*packing, f"data.root={folder}"]):
            raise RuntimeError("packing failed")
        packed = open_shards(shards).train
        contestants = {
            OURS: package(split_of(folder), [view], batch, args.workers, "seq"),
            READER: dali_reader(folder, [view], batch, args.workers),
            INDEXED: package(packed, [view], batch, args.workers, "seq"),
        }
        for latency in (0.0, args.open_latency):
            os.environ[LATENCY] = str(round(1000 * latency))
            title = f"Opens {latency:g} ms slower, JPEGs of 128 × 96 and {kilobytes:.1f} kB"
            print(title, file=sys.stderr)
            yield table(title, measure(contestants, images, args.repeats), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, choices=(224, 32), help="of the large views")
    parser.add_argument("--views", choices=("2", "2+6"), help="2+6 adds six of 96 pixels")
    parser.add_argument("--images", type=int, help="images in one turn of a contestant")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--workers", type=int, default=2, help="threads, or worker processes")
    parser.add_argument("--color-jitter", choices=("fast", "seq", "exact"), default="seq")
    parser.add_argument("--open-latency", type=float, metavar="MS", help="measure reading instead")
    parser.add_argument("--latency", type=float, metavar="MS", help="read from a server instead")
    parser.add_argument("--pictures", type=int, default=512, help="with --latency: JPEGs in all")
    parser.add_argument("--containers", action="store_true", help="compare containers instead")
    parser.add_argument("--out", type=Path, help="write the tables there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.latency is not None:
        tables = from_a_server(args)
    elif args.containers:
        tables = containers(args)
    elif args.open_latency is None:
        if not settings(args.size, args.views):
            parser.error("2+6 views are for --size 224")
        tables = augmentations(args)
    else:
        tables = slow_opens(args)
    texts = []
    for text in tables:
        print(text, end="\n\n", flush=True)
        texts.append(text)
    if args.out is not None and texts:
        versions = (
            f"torch {torch.__version__}, torchvision {torchvision.__version__}, DALI "
            f"{dali.VERSION}; {args.workers} threads or workers, {args.repeats} turns each"
        )
        args.out.write_text("\n\n".join([*texts, versions]) + "\n")


if __name__ == "__main__":
    main()
