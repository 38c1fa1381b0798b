"""Measurements of a method between epochs, and the batches for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.build import train_loader
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.loader import TrainLoader
from ddp_ssl.data.loading.reader import UnreadableError
from ddp_ssl.distributed import World
from ddp_ssl.errors import VanishedError
from ddp_ssl.methods.base import Context, Method
from ddp_ssl.utils.background import in_background
from ddp_ssl.utils.seeds import derive

logger = logging.getLogger("ddp_ssl")

AHEAD = 20  # the first batch is read during the last 20 steps of an epoch
TOGETHER = 16  # batches after which all ranks learn of a read error on one of them


@dataclass
class Measurement:
    """Calls a method's hooks between epochs, and prefetches the batches that they ask for.

    These are random batches of view 0 of the training images, from a pipeline of their own.
    """

    method: Method[Any]
    config: Config
    world: World
    data: Dataset
    bad: BadImages
    _prefetched: dict[str, Future[MeasurementBatches]] = field(default_factory=dict)

    def prefetch(self, epoch: int, steps_left: int) -> None:
        """After each step: near the epoch's end, begin to read the batches of a measurement."""
        purpose = self.method.reads_after(epoch) if steps_left <= AHEAD else None
        if purpose is not None and purpose not in self._prefetched:
            bad = self.bad.copy()  # the two threads may find different ones
            self._prefetched[purpose] = in_background(
                lambda: self._open(purpose, epoch, bad).read_first()
            )

    def cancel_prefetch(self) -> None:
        """Close unused prefetched batches as soon as they have been read."""
        for unused in self._prefetched.values():
            unused.add_done_callback(lambda f: None if f.exception() else f.result().loader.close())
        self._prefetched.clear()

    def call(self, hook: Callable[[Context], None], epoch: int) -> dict[str, float]:
        """Call `on_start` or `after_epoch` of the method; returns the figures that it reports."""
        figures: dict[str, float] = {}
        run, comm = self.config.run, self.method.comm
        batches, epochs = partial(self._batches, epoch), self.config.optim.epochs
        hook(Context(comm, run.seed, epoch, epochs, batches, figures.update, logger.info))
        self.cancel_prefetch()
        return figures

    def _batches(self, epoch: int, count: int, purpose: str) -> Iterator[Batch]:
        """`Context.batches`; raises `VanishedError` on all processes if one cannot read on."""
        if purpose in self._prefetched:
            batches = self._prefetched.pop(purpose).result()
        else:
            batches = self._open(purpose, epoch, self.bad.copy())
        try:
            count = min(count, batches.loader.steps_per_epoch)
            for number in range(1, count + 1):
                batch = batches.next()
                if number % TOGETHER == 0 or number == count:
                    stop_if_bad(self.world, batches.problem)
                yield batch
        finally:
            batches.loader.close()
            self.bad.merge(batches.bad)

    def _open(self, purpose: str, epoch: int, bad: BadImages) -> MeasurementBatches:
        device, seed = self.world.device, derive(self.config.run.seed, purpose, epoch)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        loader = train_loader(self.config, self.method.comm, self.data, device, [0], bad, seed)
        return MeasurementBatches(loader, bad)


@dataclass
class MeasurementBatches:
    """Random global batches of view 0 for one measurement."""

    loader: TrainLoader
    bad: BadImages
    problem: str | None = None
    _first: list[Batch] = field(default_factory=list)

    def read_first(self) -> MeasurementBatches:
        """Read the first batch ahead; returns itself."""
        self._first = [self.next()]
        return self

    def next(self) -> Batch:
        """The next batch. If none can be read, its images are black, and `problem` is the reason.

        The other processes do not know of the problem yet and would wait for this one.
        """
        if self._first:
            return self._first.pop()
        try:
            return next(self.loader)
        except UnreadableError as error:
            self.problem, size = str(error), self.loader.views[0].size
        images, device = self.loader.order.local_batch, self.loader.settings.device
        ids = torch.zeros(images, dtype=torch.long)
        planes = self.loader.split.channels
        return Batch([torch.zeros(images, planes, size, size, device=device)], ids, ids.to(device))


def stop_if_bad(world: World, reason: str | None) -> None:
    """Raise `VanishedError` on all processes together if one of them has a reason."""
    if world.any(reason is not None):
        reasons = world.gather_objects(reason) or []
        raise VanishedError(world.broadcast_object(next((r for r in reasons if r), None)))
