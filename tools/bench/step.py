"""The trainer's share of a step: the run's own loop against a bare one on the same batches.

    python tools/bench/step.py [--epochs 40] [--segment 11] [CONFIG.yaml] [key=value ...]

A real run of the embedded default (or of the config given) with one process and cached batches. A
step of the run is timed from the moment it has its batch to the moment it asks for the next one:
learning rate, forward, loss, backward, gradient norm, optimiser, hooks, metrics, flags, and at
logging steps the progress line and the metrics file. After each step (on a GPU after `--segment`
steps, since waiting for each would hide what overlaps) the run waits inside its loader while as
many bare steps are timed: forward, loss, backward, optimiser, with a copy of the same network. Both
are compared in segments of so many steps. The work between epochs is not counted, and no checkpoint
is written beside the steps (tools/bench/saving.py).
"""

import copy
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from compare import device_line, parser_of, spread, where
from shared import trained

from ddp_ssl import optim
from ddp_ssl.data.batch import Batch
from ddp_ssl.training.build import parameter_groups
from ddp_ssl.training.job import Job


class Turns:
    """Stands in for the run's loader, and times both loops in turn."""

    def __init__(self, job: Job, segment: int, cached: int) -> None:
        self.loader, self.segment = job.loader, segment
        self.batches = [next(job.loader) for _ in range(cached)]
        self.device = job.world.device
        self.learner = copy.deepcopy(job.network.learner)
        self.learner.train()
        self.optimizer = optim.build(job.config.optim, parameter_groups(self.learner, job.config))
        # An epoch's last step is not counted, since the epoch's end follows it.
        most = max(1, job.loader.steps_per_epoch - 1)
        self.turn = min(segment, most) if self.device.type == "cuda" else 1
        self.run: list[float] = []
        self.bare: list[float] = []
        self._step, self._taken, self._began = 0, 0, 0.0
        self._now: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __next__(self) -> Batch:
        if self._step % self.loader.steps_per_epoch == 0:
            self._taken = 0
        elif self._taken == self.turn:
            took = self._clock() - self._began
            self._now.append((1e3 * took / self.turn, 1e3 * self._bare_steps()))
            self._taken = 0
        if len(self._now) * self.turn >= self.segment:
            run, bare = zip(*self._now, strict=True)
            self.run.append(statistics.fmean(run))
            self.bare.append(statistics.fmean(bare))
            self._now = []
        batch = self.batches[self._step % len(self.batches)]
        self._step += 1
        if self._taken == 0:
            self._began = self._clock()
        self._taken += 1
        return batch

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _bare_steps(self) -> float:
        began = self._clock()
        for index in range(self._step, self._step + self.turn):
            batch = self.batches[index % len(self.batches)]
            total, _ = self.learner(batch)
            total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return (self._clock() - began) / self.turn


def measure(arguments: list[str], segment: int) -> Turns:
    """The run, to its end."""
    with trained(arguments, lambda job: Turns(job, segment, cached=4)) as turns:
        return turns


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--segment", type=int, default=11)
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        turns = measure(
            [
                # Alpha's threads would be counted. The embedded default has 11 steps an epoch.
                *(arguments or ["method.alpha_every=1000000", "log.every_steps=7"]),
                f"run.dir={folder}/run", "eval.every=0", "measure.every=0",
                "eval.knn=false", "eval.raw_pixels=false", "run.threads=1",
                f"optim.epochs={options.epochs}", "checkpoint.every=100000",
            ],
            options.segment,
        )  # fmt: skip
    if not turns.run:
        sys.exit(f"step: error: {options.epochs} epochs are less than a segment")
    unit = "ms" if turns.device.type == "cuda" else "CPU-ms"
    print(f"\n{device_line(turns.device)}; {len(turns.run)} segments of {options.segment} steps")
    print(f"a step of the run: {spread(turns.run, 2)} {unit}")
    print(f"a bare step:       {spread(turns.bare, 2)} {unit}")
    shares = [100 * (a / b - 1) for a, b in zip(turns.run, turns.bare, strict=True)]
    print(f"the trainer adds {spread(shares, 2)} %; {where(shares, 2)}")


if __name__ == "__main__":
    main()
