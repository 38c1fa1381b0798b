"""Between logging steps nothing waits for the device.

Counted as operators, on a CPU; tests/methods/test_precision.py has the same on a GPU. Not MMCR,
whose singular values have no asynchronous form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ddp_ssl import optim
from ddp_ssl.config import ConfigError
from ddp_ssl.distributed import World
from ddp_ssl.logs import console
from ddp_ssl.methods._registry import builtin_methods
from ddp_ssl.run.configure import load
from ddp_ssl.run.signals import StopRequest
from ddp_ssl.run.status import RunStatus
from ddp_ssl.run.watchdog import Watchdog
from ddp_ssl.training import loop
from ddp_ssl.training.build import build
from ddp_ssl.training.lifecycle import join
from ddp_ssl.training.recorder import Recorder
from tests.golden import Training
from tests.helpers import Operators


def no(*_: object) -> None:
    raise AssertionError("waits for the device")


@pytest.mark.parametrize("name", [n for n in builtin_methods() if n != "mmcr"])
def test_a_step_of_a_method_does_not_wait(name: str) -> None:
    training = Training(name)
    for step in range(6):  # SwAV's queue starts at its sixth epoch
        training.step(step, training.batch(step))
        training.after_epoch(step)
    batch = training.batch(6)
    with Operators() as seen, patch.object(Tensor, "tolist", no), patch.object(Tensor, "cpu", no):
        training.step(6, batch)
    assert "aten::convolution" in seen.names
    assert not seen.waits


def test_a_step_of_the_run_does_not_wait(tmp_path: Path) -> None:
    """The loop itself, in one process: probe, norm of the gradient, figures."""
    seen = Operators()

    @contextlib.contextmanager
    def outside() -> Iterator[None]:
        seen.paused += 1
        yield
        seen.paused -= 1

    def excepted(function: Any) -> Any:
        def instead(*args: Any, **options: Any) -> Any:
            with outside():
                return function(*args, **options)

        return instead

    resolved = load(
        [
            "data.batch_size=512", "optim.epochs=2", "log.every_steps=100", "eval.knn=false",
            "eval.every=0", "measure.every=0", "run.device=cpu", f"run.dir={tmp_path}/run",
        ]
    )  # fmt: skip
    world = join(resolved.config)
    watch = Watchdog(world, resolved.config.run)
    try:
        job = build(resolved, world, watch, RunStatus())
        with (
            patch.object(loop, "end_of_epoch", excepted(loop.end_of_epoch)),
            patch.object(loop, "save", excepted(loop.save)),
            patch.object(Recorder, "flush", excepted(Recorder.flush)),
            seen,
        ):
            assert loop.train(job, StopRequest()) == "done"
        job.recorder.close()
    finally:
        watch.close()
        console.setup_logging(None, 0)
    assert seen.names["aten::convolution"] > 4
    assert not seen.waits


def test_the_optimiser_gets_parameters_on_their_device(tmp_path: Path) -> None:
    """By which it chooses its kernels; what it refuses leaves no folder."""
    resolved = load([f"run.dir={tmp_path}/run"])
    world = World(0, 1, 0, 1, torch.device("meta"))
    watch, status, seen = Watchdog(world, resolved.config.run), RunStatus(), set[str]()

    def refusing(config: Any, groups: list[dict[str, Any]], backbone: Any) -> None:
        seen.update(p.device.type for group in groups for _, p in group["params"])
        raise ValueError("optim.name: refused")

    try:
        with (
            patch.object(optim, "build", refusing),
            pytest.raises(ConfigError, match=r"optim.name: refused"),
        ):
            build(resolved, world, watch, status)
    finally:
        watch.close()
        status.release()
    assert seen == {"meta"}
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_of_a_run_on_a_gpu_is_one_kernel(name: str, tmp_path: Path) -> None:
    resolved = load([f"optim.name={name}", "run.device=cuda", f"run.dir={tmp_path}/run"])
    world, status = join(resolved.config), RunStatus()
    watch = Watchdog(world, resolved.config.run)
    try:
        job = build(resolved, world, watch, status)
        assert job.network.optimizer.defaults["fused"]
        job.recorder.close()
    finally:
        watch.close()
        status.release()
        console.setup_logging(None, 0)
