"""The cost of a checkpoint: written beside training, before it goes on, and by torch.save alone.

    python tools/bench/saving.py [--repeats 9] [--steps 60] [--device cpu] [--dir .]

A ResNet-50 with AdaDim's projector and the momentum of both (36 M parameters) is saved at the
beginning of `--steps` steps, each a fixed product of matrices in one thread; the same steps without
a save are subtracted. Wall time, in turn within one process, files in a folder under `--dir`. The
run's own next save does not come before the file is there, and a second core is idle. Plain
`torch.save`, as other trainers call it, neither hashes nor waits for the disk.
"""

import contextlib
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from compare import ENOUGH, device_line, interval, parser_of, spread, verdict, where

from ddp_ssl.checkpoint import store
from ddp_ssl.checkpoint.saver import Saver
from ddp_ssl.models import projection_head

OURS, NOTHING = "written beside training", "no checkpoint"
PRODUCT = 768


def made_state(device: torch.device) -> dict[str, Any]:
    """Weights and momentum."""
    backbone = timm.create_model("resnet50", num_classes=0)
    projector = projection_head(2048, [2048, 2048, 2048], "batch", True, "none")
    weights = {**backbone.state_dict(), **{f"p.{k}": v for k, v in projector.state_dict().items()}}
    weights = {name: x.to(device) for name, x in weights.items()}
    momentum = {n: torch.randn_like(x) for n, x in weights.items() if x.is_floating_point()}
    return {"model": weights, "optimizer": momentum, "step": 1}


class Ways:
    """Each way to save; the work it returns is waited for after the clock has stopped."""

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        self.state, self.folder, self.saver = state, folder, Saver()
        self.count = itertools.count()
        self.late: list[float] = []  # seconds from the last step to the file

    def beside(self) -> Callable[[], object]:
        self.saver.start(self.state, self.write)
        return self.finish

    def finish(self) -> None:
        begin = time.perf_counter()
        outcome = self.saver.outcome(block=True)
        assert outcome is not None
        assert not outcome.problem
        self.late.append(time.perf_counter() - begin)

    def before(self) -> Callable[[], object]:
        self.write(self.state)
        return lambda: None

    def plain(self) -> Callable[[], object]:
        torch.save(self.state, self.folder / "plain.pt")
        return lambda: None

    def write(self, state: dict[str, Any]) -> None:
        step = next(self.count)
        store.save(self.folder, state, step=step, epoch=0, identity={}, world_size=1, keep=2)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dir", type=Path, default=Path())
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    state = made_state(device)
    size = sum(x.nbytes for part in ("model", "optimizer") for x in state[part].values()) / 1e6
    a = torch.randn(PRODUCT, PRODUCT, device=device)

    def train() -> None:
        for _ in range(options.steps):
            torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    folder = Path(tempfile.mkdtemp(dir=options.dir))
    ways = Ways(state, folder)
    contestants: dict[str, Callable[[], Callable[[], object]]] = {
        NOTHING: lambda: lambda: None,
        OURS: ways.beside,
        "written before it goes on": ways.before,
        "torch.save alone": ways.plain,
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    stalls: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.callback(ways.saver.close)
        for turn in range(options.repeats + 1):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                begin = time.perf_counter()
                after = contestants[name]()
                stall = time.perf_counter() - begin
                train()
                took = time.perf_counter() - begin
                after()
                if turn:
                    times[name].append(took)
                    stalls[name].append(stall)
    print(f"{device_line(device)}; {size:.0f} MB, {options.steps} steps\n")
    print("| | ms until training goes on | ms taken from training in all | times ours |")
    print("| --- | --- | --- | --- |")
    taken = {
        name: [1e3 * (a - b) for a, b in zip(times[name], times[NOTHING], strict=True)]
        for name in names[1:]
    }
    for name, values in taken.items():
        ratio = "1" if name == OURS else ratio_of(taken[OURS], values)
        stall_ms = [1e3 * s for s in stalls[name]]
        print(f"| {name} | {spread(stall_ms, 0)} | {spread(values, 0)} | {ratio} |")
    steps = statistics.median(times[NOTHING])
    lost = where(taken[OURS], 0)
    print(f"\n{options.steps} steps alone take {steps:.2f} s. Ours takes {lost} ms from them.")
    unfinished = sum(late > 0.01 for late in ways.late)
    if unfinished:
        print(
            f"In {unfinished} of {len(ways.late)} rounds the file came after the steps; "
            "more --steps would hold it."
        )


def ratio_of(ours: list[float], theirs: list[float]) -> str:
    """`verdict`; for differences that may be near zero, their interval in milliseconds."""
    if min(ours) > 0:
        return verdict(ours, theirs)
    low, high = interval([b - a for a, b in zip(ours, theirs, strict=True)])
    decided = len(ours) >= ENOUGH and (low > 0 or high < 0)
    return f"{low:.0f} to {high:.0f} ms more{'' if decided else ': undecided'}"


if __name__ == "__main__":
    main()
