"""The metrics of every step, from the device to the log."""

from __future__ import annotations

import contextlib
import math
import resource
import time
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddp_ssl.config import Config
from ddp_ssl.distributed import World
from ddp_ssl.errors import BadDataError, NonFiniteError, ViewGroupError
from ddp_ssl.logs.console import ProgressLine
from ddp_ssl.logs.writer import MetricsWriter
from ddp_ssl.training.bad_images import BadImageList
from ddp_ssl.training.rank_skew import RankSkew
from ddp_ssl.utils import device_timer
from ddp_ssl.utils.device_memory import held_by_others

Table = list[dict[str, Any]]


class Recorder:
    """Keeps the metrics of every step on the device, and writes them at logging steps.

    One reduction over processes and one synchronisation serve many rows. Non-finite losses are
    found there, on all processes together.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        steps_per_epoch: int,
        writer: MetricsWriter | None,
        bad_images: BadImageList,
        skew: RankSkew,
    ) -> None:
        """`writer` on rank 0 only."""
        self.config, self.world, self.writer = config, world, writer
        self.bad_images, self.skew = bad_images, skew
        self.step_metrics: set[str] = set()  # names of the metrics that every step has
        self.steps_per_epoch = steps_per_epoch
        self.progress = ProgressLine(config.optim.epochs, steps_per_epoch)
        self._trace = 0  # checksum of all image ids seen
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._host: list[tuple[int, dict[str, float]]] = []
        self._since = time.perf_counter()
        # Seconds since the last flush: waiting for data, keeping metrics, waiting for saves.
        self._waited = self._adding = self._saving = 0.0
        self._writing = 0.0  # seconds for each row that the last flush wrote
        self._timing = False  # whether this step's wait for data is timed on the GPU too
        self._queued: tuple[Any, Any, float] | None = None  # before, after, seconds of the host

    def begin_step(self, step: int) -> bool:
        """Before step `step` (from 1): measure waiting times, and return true, at logging steps."""
        self._timing = logging_step = self.logs(step)
        if logging_step:
            self.skew.begin()
        return logging_step

    def logs(self, step: int) -> bool:
        """Whether step `step` (from 1) is a logging step."""
        last = self.config.optim.epochs * self.steps_per_epoch
        return step % self.config.log.every_steps == 0 or step == last

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within as waiting for data.

        `next` returns before a GPU has made the batch. So at logging steps two events show how long
        the GPU's queue stands still.
        """
        timed = self._timing and self.world.device.type == "cuda"
        before = device_timer.now(self.world.device) if timed else None
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._waited += seconds
            if timed:
                self._queued = before, device_timer.now(self.world.device), seconds

    def saw(self, ids: Tensor) -> None:
        """Note the images of a step; `flush` checks that a view group sees the same ones."""
        if self.config.data.view_shards > 1:
            self._trace = zlib.crc32(ids.cpu().numpy().tobytes(), self._trace)

    def add(self, step: int, metrics: dict[str, Tensor | float]) -> None:
        """Add the metrics of one step; tensors stay on the device."""
        start = time.perf_counter()
        self.step_metrics = set(metrics)
        tensors = {n: v.detach() for n, v in metrics.items() if isinstance(v, Tensor)}
        if list(tensors) != self._names:
            paused = time.perf_counter()
            self.flush()
            self._names = list(tensors)
            start += time.perf_counter() - paused
        self._rows.append(torch.stack(list(tensors.values())))
        self._host.append((step, {n: v for n, v in metrics.items() if not isinstance(v, Tensor)}))
        self._adding += time.perf_counter() - start

    def flush(self, probe: tuple[Any, Any] | None = None) -> None:
        """Reduce, write and check the rows since the last flush, on all processes together.

        `probe`: moments before and after the probe's work in this step. Raises `NonFiniteError`,
        `ViewGroupError` or `BadDataError` on all processes.
        """
        if not self._rows:
            return
        rows, new_bad_images, view_groups_differ = self._reduce()
        table = self._table(rows, probe)
        too_many_bad = self.bad_images.share() if new_bad_images else None
        if self.logs(table[-1]["step"]):
            table[-1]["run/bad_images"] = self.bad_images.count
        self._write(table)
        self._check(table)
        if view_groups_differ:
            raise ViewGroupError(
                "the processes of a view group (data.view_shards) read different images up to step "
                f"{table[-1]['step']}, as when only one of them cannot decode a file; the "
                "checkpoints hold earlier steps only"
            )
        if too_many_bad:
            raise BadDataError(too_many_bad)

    def _reduce(self) -> tuple[list[list[float]], bool, bool]:
        """The mean rows over all processes; whether any has new bad images; whether any view group
        saw different images."""
        stacked = torch.stack(self._rows).double()
        fresh = torch.full_like(stacked[:1], len(self.bad_images.found.unreported))
        # The sum over a view group is exactly zero if all its traces are equal.
        shares = self.config.data.view_shards
        weight = 1 - shares if self.world.rank % shares == 0 else 1
        trace = torch.full_like(fresh, float(self._trace * weight))
        *rows, news, differ = self.world.mean_rows(torch.cat([stacked, fresh, trace])).tolist()
        return rows, bool(news[0]), bool(differ[0])

    def _table(self, rows: list[list[float]], probe: tuple[Any, Any] | None) -> Table:
        """The rows by name, the last one with the performance since the last flush."""
        now, steps = time.perf_counter(), len(rows)
        seconds, waited = max(now - self._since, 1e-9), self._waited
        if self._queued is not None:  # the logging step stands for all steps since the last flush
            before, after, by_host = self._queued
            waited += steps * max(device_timer.seconds_between(before, after) - by_host, 0.0)
            self._queued = None
        table: Table = [
            {
                "step": step,
                "epoch": self.epoch(step),
                **dict(zip(self._names, row, strict=True)),
                **values,
            }
            for row, (step, values) in zip(rows, self._host, strict=True)
        ]
        self._rows, self._host = [], []
        made = time.perf_counter() - now
        table[-1] |= {
            "perf/images_per_s": self.config.data.batch_size * steps / seconds,
            "perf/step_ms": 1000 * seconds / steps,
            "perf/data_wait": min(waited / seconds, 1.0),
            **_memory(self.world.device),
            "perf/log_ms": 1000 * (self._adding / steps + self._writing),
        }
        if self._saving:
            table[-1]["perf/save_ms"] = 1000 * self._saving
        self._since, self._writing = now, made / steps
        self._waited = self._adding = self._saving = 0.0
        if probe is not None:
            table[-1]["perf/probe_ms"] = 1000 * device_timer.seconds_between(*probe)
        table[-1] |= self.skew.measure()
        return table

    def _write(self, table: Table) -> None:
        if self.writer is not None:
            start = time.perf_counter()
            for row in table:
                self.writer.scalars(row)
            self.progress.update(table[-1])
            self._writing += (time.perf_counter() - start) / len(table)

    def _check(self, table: Table) -> None:
        """Raise `NonFiniteError` for the first loss or gradient that is not finite."""
        watched = ["train/loss", "train/probe_loss", "optim/grad_norm"]
        if self.config.optim.precision == "fp16":
            watched.pop()  # its scaler skips infinite gradients
        for row in table:
            for name in watched:
                if not math.isfinite(row.get(name, 0.0)):
                    raise NonFiniteError(
                        f"{name} is {row[name]} at step {row['step']} (epoch {row['epoch']}); the "
                        f"checkpoints hold earlier steps only. Lower optim.lr (now "
                        f"{self.config.optim.lr:g} per 256 images), lengthen optim.warmup_epochs "
                        "or set optim.grad_clip"
                    )

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that a step belongs to; 0 before the first."""
        return -(-step // self.steps_per_epoch)

    def row(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics that are on the host already."""
        if self.writer is not None:
            self.writer.scalars({"step": step, "epoch": self.epoch(step), **metrics})

    def image(self, name: str, image: Any) -> None:
        """A picture `[H, W, 3]` for the loggers."""
        if self.writer is not None:
            self.writer.loggers.image(name, image, 0)

    def spectrum(self, step: int, space: str, shares: Tensor) -> None:
        """A histogram of the eigenvalues' shares for the loggers, as log10: most are tiny."""
        if self.writer is not None and shares.numel() and shares.isfinite().all():
            powers = shares.clamp(min=1e-12).log10().cpu().numpy()
            self.writer.loggers.histogram(f"rep/spectrum_{space}", powers, step)

    def offset(self) -> tuple[int, int]:
        """Bytes of `metrics.jsonl` so far, and their checksum."""
        return (0, 0) if self.writer is None else (self.writer.offset(), self.writer.crc)

    def sync(self) -> None:
        """Wait until `metrics.jsonl` is on disk; from any thread."""
        if self.writer is not None:
            self.writer.sync()

    def saved(self, seconds: float) -> None:
        """Training waited that long for a checkpoint."""
        self._saving += seconds

    def restart_clock(self) -> None:
        """Do not count the time since the last flush as training."""
        self._since, self._waited = time.perf_counter(), 0.0

    def close(self) -> None:
        """Flush and close the files."""
        if self.writer is not None:
            self.writer.close()


def _memory(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB: the peak of its tensors on the GPU, or resident on a CPU.

    On a GPU also the peak that torch reserved for tensors, and what the GPU's other users hold now:
    DALI, NCCL, CUDA itself, other processes.
    """
    if device.type != "cuda":
        return {"perf/memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    return {
        "perf/memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "perf/memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        "perf/memory_others_gib": held_by_others(device) / 2**30,
    }
