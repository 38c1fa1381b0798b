"""The data of a run: the data set, the same on all processes, and the training batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.config.views import views_of
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.loader import TrainLoader
from ddp_ssl.data.loading.order import Order
from ddp_ssl.data.loading.reader import Agree
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings
from ddp_ssl.distributed import World
from ddp_ssl.distributed.agreement import on_all_ranks


def load_data(config: Config, world: World) -> Dataset:
    """The data set, the same on all ranks. Rank 0 reads it first and writes the cache."""

    def read() -> Dataset:
        return registry.load(config.data, config.run.seed)

    first = on_all_ranks(world, lambda: read() if world.is_main else None)
    data = on_all_ranks(world, lambda: read() if first is None else first)
    parts = (data.train, data.val, data.labelled)
    splits = [None if s is None else s.digest for s in parts]
    everyones = world.broadcast_object((splits, data.class_names))

    def compare() -> None:
        if everyones != (splits, data.class_names):
            raise ValueError(f"data.root: rank {world.rank} sees other files than rank 0 does")

    on_all_ranks(world, compare)
    return data


def train_loader(
    config: Config,
    comm: Comm,
    data: Dataset,
    device: torch.device,
    views: Sequence[int],
    bad: BadImages,
    seed: int | None = None,
    agree: Agree = dict,
) -> TrainLoader:
    """The training batches of this process, with some of the run's views of each image.

    `agree` only where all processes of a view group load the same batches.
    """
    d, every = config.data, views_of(config.data.views)
    seed = config.run.seed if seed is None else seed
    return TrainLoader(
        data.train,
        Order(len(data.train), d.batch_size, comm.data_rank, comm.data_shards, seed),
        Augmentation([every[k] for k in views], d.color_jitter, comm.rank, view_ids=views),
        LoaderSettings.of(d, device, half=d.dtype == "float16"),
        bad=bad,
        agree=agree,
    )
