"""Figures of every step, from the device to the log."""

from __future__ import annotations

import logging
import math
import time
import zlib
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ddp_ssl import clock, log
from ddp_ssl.config import Config
from ddp_ssl.data.source import BadImages, write_list
from ddp_ssl.distributed import World, traffic

logger = logging.getLogger("ddp_ssl")

SLOW = 0.2  # share of a step that the others wait for the slowest process
SLOW_TIMES = 3  # samples in a row before it is named


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


class BadDataError(RuntimeError):
    """More images are bad than `data.max_bad_fraction` allows."""


class ViewGroupError(RuntimeError):
    """Processes that share the views of an image did not read the same images."""


class Recorder:
    """Figures of every step, kept on the device and written at logging steps.

    One reduction over processes and one synchronisation serve many rows; a non-finite loss is
    found there, on all processes together.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        steps_per_epoch: int,
        writer: log.MetricsWriter | None,
        bad: BadImages,
        images: int,
        listed: Path,
    ) -> None:
        """`bad` are the bad ones among `images` images, for the file `listed`."""
        self.config, self.world, self.writer = config, world, writer
        self.bad, self.images, self.listed = bad, images, listed
        self.bad_count = 0
        self.of_steps: set[str] = set()  # names of figures that every step has
        self.hosts: dict[int, str] = {}  # on rank 0, of every rank
        self._listed: dict[str, str] = {}  # on rank 0: all processes'
        self._found: set[str] = set()  # of these, what was found since this process started
        self.steps_per_epoch = steps_per_epoch
        self.progress = log.Progress(config.optim.epochs, steps_per_epoch)
        self._trace = 0  # of all ids seen
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._host: list[tuple[int, dict[str, float]]] = []
        self._since = time.perf_counter()
        self._waited = 0.0
        self._adding = 0.0  # seconds of logging itself: since the last flush
        self._writing = 0.0  # and of each row that the last flush wrote
        self._saving = 0.0  # seconds that saves took since the last flush
        self._sample_start = 0.0
        self._slow: list[int] = []  # the slowest rank of each sample, while it is slow
        self._named: set[int] = set()

    def begin_step(self, step: int) -> bool:
        """Before step `step` (from 1); whether it is a logging step.

        In those it is measured who waits for whom.
        """
        sampled = self.logs(step)
        if self.world.size > 1 and sampled:
            self._sample_start = time.perf_counter()
            traffic.sample(self.world.device)
        return sampled

    def logs(self, step: int) -> bool:
        """Whether step `step` (from 1) is a logging step."""
        last = self.config.optim.epochs * self.steps_per_epoch
        return step % self.config.log.every_steps == 0 or step == last

    def waiting(self) -> _Stopwatch:
        """Time spent within counts as waiting for data."""
        return _Stopwatch(self)

    def saw(self, ids: Tensor) -> None:
        """The images of a step; that a view group saw the same is checked at logging steps."""
        if self.config.data.view_shards > 1:
            self._trace = zlib.crc32(ids.cpu().numpy().tobytes(), self._trace)

    def add(self, step: int, figures: dict[str, Tensor | float]) -> None:
        """Figures of one step: tensors stay on the device."""
        start = time.perf_counter()
        named = {n if "/" in n else f"train/{n}": v for n, v in figures.items()}
        self.of_steps = set(named)
        tensors = {n: v.detach().double() for n, v in named.items() if isinstance(v, Tensor)}
        if list(tensors) != self._names:
            paused = time.perf_counter()
            self.flush()
            self._names = list(tensors)
            start += time.perf_counter() - paused
        self._rows.append(torch.stack(list(tensors.values())))
        self._host.append((step, {n: v for n, v in named.items() if not isinstance(v, Tensor)}))
        self._adding += time.perf_counter() - start

    def flush(self, probe: tuple[Any, Any] | None = None) -> None:
        """Write the rows since the last time; raises `NonFiniteError` on all processes.

        `probe`: moments before and after the probe's work in this step.
        """
        if not self._rows:
            return
        stacked = torch.stack(self._rows)
        fresh = torch.full_like(stacked[:1], len(self.bad.fresh))
        # Summed over a view group this is zero if all traces are equal, exactly.
        shares = self.config.data.view_shards
        weight = 1 - shares if self.world.rank % shares == 0 else 1
        trace = torch.full_like(fresh, float(self._trace * weight))
        *rows, news, differ = self.world.mean_rows(torch.cat([stacked, fresh, trace])).tolist()
        names, host, steps = self._names, self._host, len(rows)
        self._rows, self._host = [], []
        now = time.perf_counter()
        seconds, waited = max(now - self._since, 1e-9), self._waited
        self._since, self._waited = now, 0.0
        table = [
            {
                "step": step,
                "epoch": self.epoch(step),
                **dict(zip(names, row, strict=True)),
                **values,
            }
            for row, (step, values) in zip(rows, host, strict=True)
        ]
        spent = time.perf_counter() - now
        table[-1] |= {
            "perf/images_per_s": self.config.data.batch_size * steps / seconds,
            "perf/step_ms": 1000 * seconds / steps,
            "perf/data_wait": min(waited / seconds, 1.0),
            "perf/memory_gib": _memory(self.world.device),
            "perf/log_ms": 1000 * (self._adding / steps + self._writing),
        }
        self._adding = 0.0
        if self._saving:
            table[-1]["perf/save_ms"] = 1000 * self._saving
            self._saving = 0.0
        if probe is not None:
            table[-1]["perf/probe_ms"] = 1000 * clock.seconds_between(*probe)
        if traffic.sampling:
            table[-1] |= self._skew()
        too_many = self._share_bad() if news[0] else None
        steps_done = host[-1][0]
        if self.logs(steps_done):
            table[-1]["run/bad_images"] = self.bad_count
        if self.writer is not None:
            start = time.perf_counter()
            for row in table:
                self.writer.scalars(row)
            self.progress.update(table[-1])
            spent += time.perf_counter() - start
        self._writing = spent / steps  # for later rows
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
        if differ[0]:
            raise ViewGroupError(
                "the processes of a view group (data.view_shards) read different images up to step "
                f"{steps_done}, as when only one of them cannot decode a file; the checkpoints "
                "hold earlier steps only"
            )
        if too_many:
            raise BadDataError(too_many)

    def _skew(self) -> dict[str, float]:
        """How long the processes wait for each other; the slowest, which waits least, is named."""
        waited = traffic.waited()
        took = time.perf_counter() - self._sample_start
        waits, steps = zip(*self.world.gather_numbers([waited, took]), strict=True)
        skew = (max(waits) - min(waits)) / max(steps)
        slowest = waits.index(min(waits))
        self._slow = [*self._slow, slowest][-SLOW_TIMES:] if skew > SLOW else []
        if self._slow == [slowest] * SLOW_TIMES and slowest not in self._named:
            self._named.add(slowest)
            self.warn(
                f"rank {slowest} ({self.hosts.get(slowest, 'host unknown')}) is slow: the others "
                f"wait {100 * skew:.0f} % of a step for it"
            )
        return {"perf/rank_skew": skew, "perf/communication_ms": 1000 * min(waits)}

    def share_bad(self) -> None:
        """Count and list every process's bad images; raises `BadDataError` on all together."""
        too_many = self._share_bad()
        if too_many:
            raise BadDataError(too_many)

    def _share_bad(self) -> str | None:
        """The same; returns why there are too many, or None."""
        parts = self.world.gather_objects(self.bad.fresh)
        self.bad.fresh = {}
        told: tuple[int, str | None] | None = None
        if parts is not None:
            found: dict[str, str] = {}
            for part in parts:
                found |= part
            self.list_bad({where: why for where, why in found.items() if where not in self._listed})
            self._found |= found.keys()
            told = len(self._listed), self._too_many()
        self.bad_count, problem = self.world.broadcast_object(told)
        return cast("str | None", problem)

    def _too_many(self) -> str | None:
        """Only what was found since this process started: what is on the list may be mended."""
        bound, count = self.config.data.max_bad_fraction, len(self._found)
        if count <= bound * self.images:
            return None
        first = next(where for where in self._listed if where in self._found)
        return (
            f"data.max_bad_fraction: {count} of {self.images} images cannot be used, more than "
            f"{bound:g} of them; the first is {printable(first)} ({self._listed[first]}), all are "
            f"in {self.listed}. Mend them or raise data.max_bad_fraction, and go on with "
            "run.resume=auto; ddp-ssl check-data finds all there are, data.skip leaves them out "
            "of a new run"
        )

    def list_bad(self, new: dict[str, str]) -> None:
        """Append to the list of bad images, on rank 0."""
        self._listed |= new
        self.bad_count = len(self._listed)
        if new:
            self._write(new, "a")
            where, why = next(iter(new.items()))
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            self.tell(f"bad image: {printable(where)} ({why}){more}; {self.bad_count} so far")

    def _write(self, new: dict[str, str], mode: Literal["w", "a"]) -> None:
        try:
            write_list(self.listed, new, mode)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.listed, error.strerror)

    def bad_images(self) -> dict[str, str]:
        """What is on the list, for the checkpoint."""
        return dict(self._listed)

    def restore_bad(self, listed: dict[str, str]) -> None:
        """The list as it was at a checkpoint, on rank 0; the rest will be found again."""
        self._listed, self.bad_count = dict(listed), len(listed)
        if listed:
            self._write(listed, "w")
        else:
            self.listed.unlink(missing_ok=True)

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that a step belongs to; 0 before the first."""
        return -(-step // self.steps_per_epoch)

    def row(self, step: int, figures: dict[str, float]) -> None:
        """Figures that are on the host already."""
        if self.writer is not None:
            self.writer.scalars({"step": step, "epoch": self.epoch(step), **figures})

    def warn(self, text: str) -> None:
        """A warning for people, on rank 0."""
        if self.writer is not None:
            logger.warning("%s", text)

    def tell(self, text: str) -> None:
        """A line for people, on rank 0."""
        if self.writer is not None:
            self.progress.tell(text)

    def image(self, name: str, image: Any, path: Path) -> None:
        """A picture `[H, W, 3]` in the folder and in TensorBoard."""
        from PIL import Image

        Image.fromarray(image).save(path)
        if self.writer is not None:
            self.writer.image(name, image, 0)

    def spectrum(self, step: int, space: str, shares: Tensor) -> None:
        """TensorBoard's histogram of the eigenvalues' shares, as log10: most are tiny."""
        if self.writer is not None and shares.numel() and shares.isfinite().all():
            powers = shares.clamp(min=1e-12).log10().cpu().numpy()
            self.writer.histogram(f"rep/spectrum_{space}", powers, step)

    def offset(self) -> int:
        """Bytes of `metrics.jsonl` so far."""
        return self.writer.offset() if self.writer is not None else 0

    def sync(self) -> None:
        """Wait until `metrics.jsonl` is on disk; from any thread. Raises `OSError`."""
        if self.writer is not None:
            self.writer.sync()

    def saved(self, seconds: float) -> None:
        """Training waited that long for a checkpoint."""
        self._saving += seconds

    def restart_clock(self) -> None:
        """Do not count what happened since the last flush as training."""
        self._since, self._waited = time.perf_counter(), 0.0

    def close(self) -> None:
        """Flush and close the files."""
        if self.writer is not None:
            self.writer.close()


class _Stopwatch:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.recorder._waited += time.perf_counter() - self.start


def _memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: the GPU's, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def printable(path: str) -> str:
    """A path for people: any bytes may be a name."""
    return path.encode("utf-8", "replace").decode()
