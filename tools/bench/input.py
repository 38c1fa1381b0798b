"""The ratio of images/s from JPEG files to images/s with cached batches.

    python tools/bench/input.py [--batch 8] [--images 128] [--segment 8] [--segments 9]
        [CONFIG.yaml] [key=value ...]

A real run of one process on JPEGs made here (500 x 375). Its loader hands out real batches for a
segment of steps and cached ones for the next, in turn. Time is the wall clock's, waiting included.
Then the loader runs alone. A GPU can reach a ratio of 1 if the loader alone is faster. On a CPU
training and loading share the cores, so the best ratio is that of added times; it is printed.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from compare import device_line, parser_of, spread, where
from data import write_pictures
from shared import trained

from ddp_ssl.data.batch import Batch
from ddp_ssl.training.job import Job


class Alternating:
    """Stands in for the run's loader: files and cached batches in turn; images/s of each."""

    def __init__(self, job: Job, segment: int) -> None:
        self.loader, self.segment = job.loader, segment
        self.device, self.images = job.world.device, job.config.data.batch_size
        self.ahead = job.config.data.prefetch + 1
        if segment <= self.ahead:
            sys.exit(f"input: error: --segment {segment}: more than {self.ahead} is needed")
        self.cached = [next(job.loader) for _ in range(2)]
        self.rates: dict[str, list[float]] = {"files": [], "cached": []}
        self.alone = 0.0
        self._step, self._began = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __next__(self) -> Batch:
        turn, within = divmod(self._step, self.segment)
        kind = "files" if turn % 2 == 0 else "cached"
        if within == 0 and turn > 2:  # the first turns warm up
            last = "cached" if kind == "files" else "files"
            timed = self.segment - self.ahead
            self.rates[last].append(timed * self.images / (self._clock() - self._began))
        if within == self.ahead:  # not what was read ahead while the other kind had its turn
            self._began = self._clock()
        self._step += 1
        return next(self.loader) if kind == "files" else self.cached[within % 2]

    def time_alone(self) -> None:
        """Images/s of the loader with nothing beside it, into `alone`."""
        for _ in range(self.ahead):
            next(self.loader)
        began = self._clock()
        for _ in range(self.segment):
            next(self.loader)
        self.alone = self.segment * self.images / (self._clock() - began)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(arguments: list[str], segment: int) -> Alternating:
    """The run, to its end."""
    with trained(arguments, lambda job: Alternating(job, segment)) as turns:
        turns.time_alone()
        return turns


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--segment", type=int, default=8)
    parser.add_argument("--segments", type=int, default=9)
    options, arguments = parser.parse_known_args()
    steps = options.segment * (2 * options.segments + 4)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        write_pictures(images, options.images, 375, 500)
        turns = measure(
            [
                "data.name=folder", f"data.root={images}", "model.backbone=resnet18",
                "model.backbone_args={}", "data.views=[{count: 2, size: 224, recipe: asym}]",
                f"data.batch_size={options.batch}", f"run.dir={folder}/run", "eval.every=0",
                "measure.every=0", "eval.knn=false", "eval.raw_pixels=false",
                "optim.precision=fp32" if not torch.cuda.is_available() else "optim.precision=bf16",
                "method.alpha_every=10000", f"log.every_steps={options.segment}",
                f"optim.epochs={-(-steps * options.batch // (options.images * 9 // 10))}",
                *arguments,
            ],
            options.segment,
        )  # fmt: skip
    files, cached = (turns.rates[kind] for kind in ("files", "cached"))
    print(f"\n{device_line(turns.device)}; images/s, median (range) of {len(files)} segments")
    print(f"from files: {spread(files)}; cached batches: {spread(cached)}")
    compute = statistics.median(cached)
    best = 1.0 if turns.device.type == "cuda" else turns.alone / (turns.alone + compute)
    print(f"the loader alone: {turns.alone:.4g}")
    ratios = [a / b for a, b in zip(files, cached, strict=False)]  # the last may have no partner
    print(f"ratio {spread(ratios, 3)}, of at most {best:.3f}; {where(ratios, 3)}")


if __name__ == "__main__":
    main()
