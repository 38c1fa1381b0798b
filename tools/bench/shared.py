"""What benchmarks of the step share: a run fed by them, and processes with random images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ddp_ssl import distributed, engine, log
from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, load
from ddp_ssl.data.augment import views_of
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import World
from ddp_ssl.evals.probe import Learner
from ddp_ssl.signals import StopRequest
from ddp_ssl.watchdog import Watchdog

CLASSES, ALPHA = 10, 0.5
Feeder = TypeVar("Feeder")


@contextmanager
def trained(arguments: list[str], feed: Callable[[engine.Job], Feeder]) -> Iterator[Feeder]:
    """A real run, to its end, whose loader is what `feed` makes; it is still open within."""
    resolved = load(arguments)
    world = engine.join(resolved.config)
    log.setup_logging(None, world.rank)
    watch = Watchdog(world, resolved.config.run)
    job = engine.build(resolved, world, watch, [])
    feeder = feed(job)
    job.loader = feeder  # type: ignore[assignment]
    try:
        engine.train(job, StopRequest())
        yield feeder
    finally:
        job.recorder.close()
        watch.close()


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
    learner = Learner(engine.make_method(config, comm), CLASSES, some_unlabelled=False)
    if hasattr(learner.method, "alpha"):
        learner.method.alpha = ALPHA
    return learner


def random_batch(config: Config, comm: Comm) -> Batch:
    """This process's images, its own, on the CPU."""
    torch.manual_seed(1 + comm.rank)
    n = config.data.batch_size // comm.data_shards
    held = views_of(config.data.views)[comm.views]
    ids = torch.arange(n)
    return Batch([torch.rand(n, 3, view.size, view.size) for view in held], ids, ids % CLASSES)
