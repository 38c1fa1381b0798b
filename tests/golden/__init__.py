"""Golden losses: 20 steps of every method from fixed tensors in float64.

A refactoring leaves the files as they are. `make golden` rewrites them, and a difference there
needs a line in CHANGELOG.md that says why the numbers changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ddp_ssl import optim
from ddp_ssl.data.batch import Batch
from ddp_ssl.methods._registry import builtin_methods
from ddp_ssl.methods.base import Context, Output, Progress
from tests.helpers import batch_of, config_of, images, method_of

FOLDER = Path(__file__).parent
STEPS = 20
SETTINGS = {
    "adadim": ("method.alpha=fixed", "method.alpha_value=0.3", "method.beta_scale=0.1"),
    "barlow_twins": ("method.off_diagonal=0.0051", "optim.name=lars"),
    "deepclusterv2": ("method.prototypes=[5, 3, 4]", "optim.name=lars"),
    "byol": ("method.momentum=0.99", "optim.name=lars", "optim.weight_decay=1e-6"),
    "simsiam": ("method.predictor_hidden=128", "optim.name=lars"),
    "lejepa": ("method.slices=16", "optim.name=lars"),
    "mocov3": ("method.momentum=0.99", "optim.name=lars"),
    "mocov2plus": ("method.queue_size=31", "optim.name=lars", "model.projector_norm=none"),
    "nnclr": ("method.queue_size=31", "optim.name=lars"),
    "ressl": ("method.queue_size=31", "optim.name=lars", "model.projector_norm=none"),
    "dino": (
        "method.prototypes=9",
        "method.warmup_teacher_temperature=0.04",
        "method.teacher_temperature=0.07",
        "method.warmup_teacher_epochs=9",
        "method.momentum=0.99",
        "optim.name=lars",
    ),
    "swav": (
        "method.prototypes=7",
        "method.epsilon=0.05",
        "method.queue_size=30",
        "method.queue_epoch=5",
        "optim.name=lars",
    ),
}


class Training:
    """A method, its optimiser and a step at a time on images that depend on the step alone."""

    def __init__(self, name: str) -> None:
        settings = (f"method.name={name}", "optim.lr=1", "optim.epochs=20", "optim.warmup_epochs=3")
        self.config = config_of(*settings, *SETTINGS.get(name, ()))
        self.method = method_of(self.config)
        self.optimizer = optim.build(self.config.optim, self.method.parameter_groups())
        self.method.on_start(self._context(0))
        self.method.train()

    def _context(self, epoch: int) -> Context:
        def batches(count: int, purpose: str) -> Iterator[Batch]:
            yield from [batch_of(images(1, 12))][:count]

        return Context(
            self.method.comm, 0, epoch, STEPS, batches, lambda figures: None, lambda text: None
        )

    def batch(self, step: int) -> Batch:
        """The images of a step."""
        torch.manual_seed(step)
        x = images(2, 12) + 0.3 * torch.randn(2, 12, 3, 16, 16, dtype=torch.float64)
        return batch_of(x)

    def step(self, step: int, batch: Batch) -> Output:
        """What a step of the run does."""
        optim.set_learning_rates(self.optimizer, self.config.optim, 12, step, 1)
        out = self.method(batch)
        out.loss.backward()
        progress = Progress(step, STEPS, step, STEPS)
        self.method.before_optimizer(progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(progress)
        return out

    def after_epoch(self, step: int) -> None:
        """A step is an epoch here."""
        self.method.after_epoch(self._context(step))
        self.method.train()


def losses(name: str) -> list[dict[str, Any]]:
    """Loss and terms of each step of a short training with LARS."""
    torch.set_num_threads(2)  # as when the files were written: MMCR's singular values depend on it
    training, rows = Training(name), []
    for step in range(STEPS):
        out = training.step(step, training.batch(step))
        training.after_epoch(step)
        terms = {term: float(torch.as_tensor(value).detach()) for term, value in out.terms.items()}
        rows.append({"step": step, "loss": float(out.loss.detach()), **terms})
    return rows


def write() -> None:
    """Rewrite every file."""
    for name in builtin_methods():
        lines = [json.dumps(row) for row in losses(name)]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
