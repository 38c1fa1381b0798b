"""One short trace of the training loop: `run.profile=FROM:TO`."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ddp_ssl.config import Config
from ddp_ssl.distributed import World
from ddp_ssl.utils.files import replace_text
from ddp_ssl.utils.text import one_line

logger = logging.getLogger("ddp_ssl")

ROWS = 40  # of the table of operators


class Profiler:
    """Traces the steps FROM to TO - 1, counted from 0, on rank 0 and on the last rank.

    Into `profile/` of the run folder: `rankN.json.gz`, which chrome://tracing and Perfetto open,
    and `rank0.txt`, the longest operators. An error here never ends the run. A run that starts
    within the window traces the rest of it; one that stops there writes the part it has.
    """

    def __init__(self, config: Config, world: World, folder: Path) -> None:
        self._rank, self._cuda = world.rank, world.device.type == "cuda"
        self._folder = folder / "profile"
        self._window: tuple[int, int] | None = None
        if config.run.profile is not None and world.rank in (0, world.size - 1):
            first, _, end = config.run.profile.partition(":")
            self._window = int(first), int(end)
        self._trace: Any = None
        self._step: Any = None  # the range of the step under way, so that the trace shows steps

    def step(self, step: int) -> None:
        """`step` steps are done. Called after each; before the first one too, to trace it."""
        if self._window is None:
            return
        first, end = self._window
        try:
            if self._trace is None and first <= step < end:
                self._begin()
            if self._trace is not None:
                self._mark(step if step < end else None)
            if step >= end:
                self.close()
        except Exception as error:  # a trace is not worth the run
            self._give_up(error)

    def close(self) -> None:
        """Write the trace, if there is one."""
        trace, window, self._trace, self._window = self._trace, self._window, None, None
        if trace is None:
            if window is not None and self._rank == 0:
                logger.warning("run.profile: the run was at none of the steps %d to %d",
                               window[0], window[1] - 1)  # fmt: skip
            return
        try:
            self._mark(None)
            if self._cuda:
                torch.cuda.synchronize()  # kernels under way belong to the steps
            trace.stop()
            self._write(trace)
        except Exception as error:
            self._give_up(error)

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        trace = torch.profiler.profile(activities=activities)
        trace.start()
        self._trace = trace

    def _mark(self, step: int | None) -> None:
        """End the range of the step before; begin that of `step`."""
        before, self._step = self._step, None
        if before is not None:
            before.__exit__(None, None, None)
        if step is not None:
            self._step = record_function(f"step {step}")
            self._step.__enter__()

    def _write(self, trace: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank{self._rank}.json.gz"
        unfinished = path.with_name(f"part-{path.name}")  # the ending .gz compresses it
        try:
            trace.export_chrome_trace(str(unfinished))
            unfinished.replace(path)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
        if self._rank == 0:
            order = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
            table = trace.key_averages().table(sort_by=order, row_limit=ROWS)
            replace_text(self._folder / "rank0.txt", table)
            logger.info("trace of %s; chrome://tracing or ui.perfetto.dev opens it", path)

    def _give_up(self, error: Exception) -> None:
        trace, self._trace, self._window = self._trace, None, None
        if trace is not None:
            with contextlib.suppress(Exception):
                trace.stop()
        reason = one_line(error) or type(error).__name__
        logger.warning("run.profile: no whole trace of rank %d, going on: %s", self._rank, reason)
