"""Every method in bfloat16: on the CPU its numbers, on a GPU that a step waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ddp_ssl import optim
from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.data.batch import Batch
from ddp_ssl.methods._registry import builtin_methods
from ddp_ssl.methods.base import Context, Method, Progress
from ddp_ssl.training.build import set_float32_products
from tests.helpers import config_of, images, method_of
from tests.methods.settings import SETTINGS

STEPS = 3  # a step is an epoch


class Training:
    """Twelve images of 64 px, for torch's bf16 convolution (see tests/test_resume.py)."""

    def __init__(self, name: str, device: str) -> None:
        self.config = config_of(
            f"method.name={name}",
            "data.views=[{count: 2, size: 64, recipe: sym}]",
            "optim.precision=bf16",
            "optim.warmup_epochs=0",
            "optim.lr=0.1",
            "model.backbone_args={channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}",
            *SETTINGS.get(name, ()),
        )
        self.method: Method[Any] = method_of(self.config, dtype=torch.float32).to(device)
        self.optimizer = optim.build(self.config.optim, self.method.parameter_groups())
        x = images(2, 12, 64, torch.float32).to(device)
        ids = torch.arange(12)
        self.batch = Batch(list(x), ids, ids % 3)
        self.method.on_start(self.context(0))
        self.method.train()

    def context(self, epoch: int) -> Context:
        def batches(count: int, purpose: str) -> Iterator[Batch]:
            yield Batch(self.batch.views[:1], self.batch.ids, self.batch.labels)

        return Context(
            ONE_PROCESS, 0, epoch, STEPS, batches, lambda figures: None, lambda text: None
        )

    def step(self, step: int) -> torch.Tensor:
        """Forward, backward and hooks; the loss."""
        out = self.method(self.batch)
        out.loss.backward()
        progress = Progress(step, STEPS, step, STEPS)
        self.method.before_optimizer(progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(progress)
        return out.loss.detach()


def dtypes(state: Any, path: str = "") -> dict[str, torch.dtype]:
    """Of every tensor in a state dict, extra state included."""
    if torch.is_tensor(state):
        return {path: state.dtype}
    if isinstance(state, dict):
        found = [dtypes(value, f"{path}/{key}") for key, value in state.items()]
        return {key: value for part in found for key, value in part.items()}
    return {}


@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
def test_products_on_a_gpu_are_those_of_the_setting(precision: str, before: str) -> None:
    """Runs with autocast keep what the process has chosen."""
    own = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        set_float32_products(precision)
        now = {"tf32": "high", "fp32": "highest"}.get(precision, before)
        assert torch.get_float32_matmul_precision() == now
        assert torch.backends.cuda.matmul.allow_tf32 == (now == "high")
    finally:
        torch.set_float32_matmul_precision(own)


@pytest.mark.parametrize("name", builtin_methods())
def test_bfloat16_ends_before_the_loss_and_the_state(name: str) -> None:
    training = Training(name, "cpu")
    before = dtypes(training.method.state_dict())
    for step in range(STEPS):
        loss = training.step(step)
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        training.method.after_epoch(training.context(step))
        training.method.train()
    state = training.method.state_dict()
    assert dtypes(state) == before
    assert torch.bfloat16 not in before.values()
    for key, value in state.items():
        assert not torch.is_tensor(value) or torch.isfinite(value).all(), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [n for n in builtin_methods() if n != "mmcr"])
def test_a_step_waits_for_nothing_on_the_device(name: str) -> None:
    """Forward, backward and hooks never make the host wait; the loop alone decides when it does.

    Not MMCR: `torch.linalg.svdvals` synchronises, and it has no asynchronous form.
    """
    training = Training(name, "cuda")
    training.step(0)  # allocations, cuDNN's choices
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = training.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
