"""Golden losses: 20 steps of every method from fixed tensors in float64.

A refactoring leaves the files as they are. `make golden` rewrites them, and a difference there
needs a line in CHANGELOG.md that says why the numbers changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ddp_ssl import optim
from ddp_ssl.config import builtin_methods
from ddp_ssl.methods.base import Progress
from tests.helpers import batch_of, config_of, images, method_of

FOLDER = Path(__file__).parent
STEPS = 20
SETTINGS = {
    "adadim": ("method.alpha=fixed", "method.alpha_value=0.3", "method.beta_scale=0.1"),
}


def losses(name: str) -> list[dict[str, Any]]:
    """Loss and terms of each step of a short training with LARS."""
    settings = (f"method.name={name}", "optim.lr=1", "optim.epochs=20", "optim.warmup_epochs=3")
    config = config_of(*settings, *SETTINGS.get(name, ()))
    method = method_of(config)
    optimizer = optim.build(config.optim, method.parameter_groups())
    rows = []
    for step in range(STEPS):
        optim.set_learning_rates(optimizer, config.optim, 12, step, 1)
        torch.manual_seed(step)
        x = images(2, 12) + 0.3 * torch.randn(2, 12, 3, 16, 16, dtype=torch.float64)
        out = method(batch_of(x))
        out.loss.backward()
        progress = Progress(step, STEPS, step, STEPS)
        method.before_optimizer(progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(progress)
        terms = {term: float(torch.as_tensor(value).detach()) for term, value in out.terms.items()}
        rows.append({"step": step, "loss": float(out.loss.detach()), **terms})
    return rows


def write() -> None:
    """Rewrite every file."""
    for name in builtin_methods():
        lines = [json.dumps(row) for row in losses(name)]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
