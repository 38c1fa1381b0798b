"""Shared by the benchmarks of the step: a run that they feed, processes with random images."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from ddp_ssl import distributed
from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.config.views import views_of
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import World
from ddp_ssl.logs import console
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import make_method
from ddp_ssl.run.configure import load
from ddp_ssl.run.signals import StopRequest
from ddp_ssl.run.status import RunStatus
from ddp_ssl.run.watchdog import Watchdog
from ddp_ssl.training import build, lifecycle, loop
from ddp_ssl.training.job import Job
from ddp_ssl.utils.seeds import derive

CLASSES, ALPHA = 10, 0.5
Feeder = TypeVar("Feeder")


@contextmanager
def trained(
    arguments: list[str],
    feed: Callable[[Job], Feeder],
    stop: StopRequest | None = None,
) -> Iterator[Feeder]:
    """A real run with the loader that `feed` makes, to its end or until `stop` asks.

    The run is still open within.
    """
    resolved = load(arguments)
    world = lifecycle.join(resolved.config)
    console.setup_logging(None, world.rank)
    watch = Watchdog(world, resolved.config.run)
    status = RunStatus()
    job = build.build(resolved, world, watch, status)
    feeder = feed(job)
    job.loader = feeder  # type: ignore[assignment]
    try:
        loop.train(job, stop or StopRequest())
        yield feeder
    finally:
        job.recorder.close()
        watch.close()
        status.release()


class RandomLoader:
    """Stands in for the training loader without DALI: random images, a function of the step alone.

    The same on a CPU and a GPU, and after a resume. `steps_per_epoch` is its own.
    """

    def __init__(self, config: Config, comm: Comm, device: torch.device, views: Sequence[int],
                 steps_per_epoch: int) -> None:  # fmt: skip
        self.steps_per_epoch, self.step, self.failing = steps_per_epoch, 0, None
        self.device = device
        self.first = comm.data_rank * config.data.batch_size // comm.data_shards
        every = views_of(config.data.views)
        self.view_ids, self.views = list(views), [every[k] for k in views]
        self.order = SimpleNamespace(local_batch=config.data.batch_size // comm.data_shards)

    def __next__(self) -> Batch:
        n, views = self.order.local_batch, []
        for k, view in zip(self.view_ids, self.views, strict=True):
            generator = torch.Generator().manual_seed(derive(0, self.step, self.first, k))
            pixels = torch.randn(n, view.size, view.size, 3, generator=generator)
            views.append(pixels.to(self.device))
        ids = torch.arange(n) + self.first
        self.step += 1
        return Batch([v.permute(0, 3, 1, 2) for v in views], ids, (ids % CLASSES).to(self.device))

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any], step: int) -> None:
        self.step = step

    def close(self) -> None:
        pass


@contextmanager
def without_input(steps_per_epoch: int) -> Iterator[None]:
    """In this context runs train on a `RandomLoader` and do not validate, so none needs DALI."""

    def loader(config: Config, comm: Comm, data: Any, device: torch.device, views: Sequence[int],
               *rest: Any, **options: Any) -> RandomLoader:  # fmt: skip
        return RandomLoader(config, comm, device, views, steps_per_epoch)

    load_data = build.load_data
    with (
        patch.object(build, "train_loader", loader),
        patch.object(build, "load_data", lambda *args: replace(load_data(*args), val=None)),
    ):
        yield


def join(rank: int, size: int, port: int, device: str, timeout_s: float) -> World:
    """This process, with one thread, as `rank` of `size` on this machine."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    return distributed.start(device, timeout_s)


def learner_of(config: Config, comm: Comm) -> Learner:
    """The run's method and probe with the same weights everywhere; alpha as once measured."""
    torch.manual_seed(0)
    learner = Learner(make_method(config, comm), CLASSES, some_unlabelled=False)
    if hasattr(learner.method, "alpha"):
        learner.method.alpha.value = ALPHA
    return learner


def random_batch(config: Config, comm: Comm) -> Batch:
    """This process's images, its own, on the CPU."""
    torch.manual_seed(1 + comm.rank)
    n = config.data.batch_size // comm.data_shards
    held = views_of(config.data.views)[comm.views]
    ids = torch.arange(n)
    return Batch([torch.rand(n, 3, view.size, view.size) for view in held], ids, ids % CLASSES)
