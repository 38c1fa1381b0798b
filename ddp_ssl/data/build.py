"""The data of a run: the data set, the same on all processes, and the training batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from ddp_ssl.agreement import on_all_ranks
from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.data import datasets
from ddp_ssl.data.augment import views_of
from ddp_ssl.data.loader import StreamLoader, TrainLoader
from ddp_ssl.data.source import Agree, BadImages
from ddp_ssl.distributed import World


def load_data(config: Config, world: World) -> datasets.Dataset:
    """The data set on every rank, the same on all; rank 0 first, which writes what is cached."""

    def read() -> datasets.Dataset:
        return datasets.load(config.data, config.run.seed)

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
    data: datasets.Dataset,
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
    kind: Callable[..., TrainLoader] = TrainLoader
    if d.reader == "streamed":
        assert data.train.shards is not None
        kind = functools.partial(StreamLoader, **data.train.shards.stream(d.url))
    return kind(
        data.train,
        [every[k] for k in views],
        view_ids=views,
        global_batch=d.batch_size,
        shard=comm.data_rank,
        num_shards=comm.data_shards,
        seed=config.run.seed if seed is None else seed,
        salt=comm.rank,
        color_jitter=d.color_jitter,
        **datasets.reading(d, half=d.dtype == "float16"),
        device=device,
        bad=bad,
        agree=agree,
    )
