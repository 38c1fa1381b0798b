"""The cost of spreading the views of an image over processes: `data.view_shards`.

    python tools/bench/view_shards.py [--views 8] [--world 8] [--batch 16] [--repeats 5]

For one process of `--world` and each V that divides: the images it reads, the views it makes and
its CPU time in a step of `--batch` images with `--views` views of 224 px. The loader is the one
that trains. The different V take turns.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from compare import parser_of
from data import endless, split_of, write_pictures

from ddp_ssl.config import ViewGroup
from ddp_ssl.config.views import views_of
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.formats import PixelFormat
from ddp_ssl.data.loading.loader import TrainLoader
from ddp_ssl.data.loading.order import Order
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings

STEPS = 8


def loader_of(split: Split, views: int, world: int, batch: int, shards: int) -> TrainLoader:
    """The loader of rank 0."""
    half = (0.5, 0.5, 0.5)
    return TrainLoader(
        split,
        Order(len(split), batch, shard=0, num_shards=world // shards, seed=0),
        Augmentation(
            views_of([ViewGroup(count=views, size=224, recipe="sym")])[::shards],
            "seq",
            view_ids=range(0, views, shards),
        ),
        LoaderSettings(PixelFormat(half, half), torch.device("cpu"), threads=1),
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    views, world, batch = options.views, options.world, options.batch
    kinds = [
        v for v in range(1, world + 1)
        if world % v == 0 and views % v == 0 and batch % (world // v) == 0
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), max(2 * batch, 64), 375, 500)
        split = split_of(Path(folder))
        loaders = {v: loader_of(split, views, world, batch, v) for v in kinds}
        turns = {v: endless(loader, 1) for v, loader in loaders.items()}
        times: dict[int, list[float]] = {v: [] for v in kinds}
        for _ in range(options.repeats):
            for v, turn in turns.items():
                times[v].append(turn(STEPS).ms)
    print(f"{batch} images x {views} views of 224 px over {world} processes, one thread each\n")
    print(
        "| view shards | images a process reads | views it makes | CPU ms a step | against V = 1 |"
    )
    print("| --- | --- | --- | --- | --- |")
    base = statistics.median(times[kinds[0]])
    for v in kinds:
        median, images = statistics.median(times[v]), batch * v // world
        low, high = min(times[v]), max(times[v])
        print(
            f"| {v} | {images} | {images * views // v} | {median:.1f} "
            f"[{low:.1f} to {high:.1f}] | {median / base:.2f} |"
        )


if __name__ == "__main__":
    main()
