"""Whole training runs on small photographs, in this process or as a user starts them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ddp_ssl.checkpoint.saver import Saver
from ddp_ssl.commands import common
from ddp_ssl.run.configure import DIGITS
from tests.helpers import SHALLOW, TINY
from tests.ranks import Ranks

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
WAIT_S = 60
Seen = list[tuple[list[int], list[torch.Tensor]]]


# AdaDim for 3 epochs of a tiny network, with everything switched on.
SMALL = (
    *TINY,
    SHALLOW,
    "run.threads=1",
    "data.threads=1",
    "optim.epochs=3",
    "method.alpha_every=1",
    "method.beta_scale=0.1",
    "measure.every=1",
    "eval.raw_pixels=false",
    "log.every_steps=2",
    "log.tensorboard=false",
)


def arguments(photos: Path, folder: Path, *more: str) -> list[str]:
    """AdaDim for 3 epochs of 3 steps, with everything switched on."""
    return [
        str(DIGITS / "default.yaml"),
        "data.name=folder",
        f"data.root={photos}",
        f"run.dir={folder}",
        *SMALL,
        "optim.lr=1.0",
        "eval.every=1",
        "checkpoint.every_steps=2",
        *more,
    ]


# Less than half the time, for tests of the steps: only the start and the end are evaluated.
STEPS_ONLY = ("eval.every=0", "measure.every=0")
BARE = (*STEPS_ONLY, "method.alpha_every=100", "log.every_steps=1")


class Whole:
    """Folders of uninterrupted runs, each made once per session."""

    def __init__(self, ranks: Ranks, photos: Path, root: Path) -> None:
        self.ranks, self.photos, self.root = ranks, photos, root
        self.made: dict[tuple[int, tuple[str, ...]], Path] = {}

    def __call__(self, size: int, *more: str) -> Path:
        """The run of `size` processes with `arguments(..., *more)`; not to be written to."""
        if (size, more) not in self.made:
            folder = self.root / f"{len(self.made)}"
            codes = self.ranks.launch(train, size, arguments(self.photos, folder, *more))
            assert codes == [0] * size
            self.made[size, more] = folder
        return self.made[size, more]


def train(
    args: list[str],
    die_at: int | None = None,
    break_at: int | None = None,
    stop_at: int | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> int | str:
    """Run in this process; `die_at` ends it before that step, `break_at` gives a NaN there.

    `stop_at` is a SIGTERM there. `on_step` is called before every step with the job;
    `job.state.step` steps are done.
    """
    from ddp_ssl.train import main

    def before(job: Any) -> None:
        if job.state.step == die_at:
            raise SystemExit("killed")
        if job.state.step == break_at:
            with torch.no_grad():
                job.network.optimizer.param_groups[0]["params"][0].fill_(float("nan"))
        if job.state.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if on_step is not None:
            on_step(job)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    handlers = {n: signal.getsignal(n) for n in numbers}
    try:
        return main(args, before)
    except SystemExit as end:
        return str(end)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def complaint(args: list[str]) -> tuple[int | str, str]:
    """The exit code and what went to stderr.

    Of a rank that waits for rank 0, up to there: a launcher would end it when rank 0 has said why.
    """
    before_wait: list[str] = []
    with (
        contextlib.redirect_stderr(io.StringIO()) as captured,
        patch.object(common, "wait_for_rank_0", lambda: before_wait.append(captured.getvalue())),
    ):
        code = train(args)
    return code, [*before_wait, captured.getvalue()][0]


def restarted(args: list[str]) -> int | str:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    try:
        return train(args)
    finally:
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was logged, but for times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in parsed]


def status(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return loaded


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Nested state, compared to the last bit."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same_bits(ours[key], value)
    elif isinstance(theirs, list | tuple):
        for x, y in zip(ours, theirs, strict=True):
            assert_same_bits(x, y)
    else:
        assert ours == theirs


def watch(args: list[str], die_at: int | None = None) -> tuple[int | str, Seen]:
    """Run in this process; the ids and views of every training step, in order."""
    from ddp_ssl.training import loop

    original, seen = loop.train, []

    def watched(job: Any, *rest: Any) -> Any:
        class Watching:
            def __getattr__(self, name: str) -> Any:
                return getattr(loader, name)

            def __next__(self) -> Any:
                batch = next(loader)
                seen.append((batch.ids.tolist(), [v.clone() for v in batch.views]))
                return batch

        loader, job.loader = job.loader, Watching()
        return original(job, *rest)

    loop.train = watched
    try:
        return train(args, die_at), seen
    finally:
        loop.train = original


def ids_of(results: list[tuple[Any, Seen]], view_shards: int = 1) -> list[list[int]]:
    """Each step's global batch, in canonical order; a view group must read the same."""
    steps = []
    for parts in zip(*(seen for _, seen in results), strict=True):
        groups = [parts[i : i + view_shards] for i in range(0, len(parts), view_shards)]
        assert all(part[0] == group[0][0] for group in groups for part in group)
        steps.append([i for group in groups for i in group[0][0]])
    return steps


class Writes:
    """What this process writes in the background."""

    def __init__(self) -> None:
        self.savers: list[Saver] = []
        original = Saver.start

        def start(saver: Saver, *rest: Any) -> None:
            self.savers.append(saver)
            original(saver, *rest)

        self.patch = patch.object(Saver, "start", start)

    def __enter__(self) -> Writes:
        self.patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.stop()

    def finish(self) -> None:
        """Wait until nothing is being written."""
        under_way = [s._writing for s in self.savers if s._writing is not None]
        assert not wait(under_way, WAIT_S).not_done


def call(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, in an environment without ranks."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300
    )
