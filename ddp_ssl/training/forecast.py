"""What will disappoint in a run, from its config and the number of its steps alone."""

from __future__ import annotations

from collections.abc import Iterator

from ddp_ssl.config import Config
from ddp_ssl.utils.launcher import has_bf16

FEW_STEPS = 1000
"""Fewer steps than this leave a recipe of LARS far from its end (docs/troubleshooting.md)."""


def forecast(config: Config, steps_per_epoch: int, on_cpu: bool) -> Iterator[str]:
    """A line for each thing that will disappoint: what, why, and the key that changes it."""
    optim, method = config.optim, config.method
    steps = optim.epochs * steps_per_epoch
    yield from method.remarks(config)
    if optim.warmup_epochs >= optim.epochs:
        yield (
            f"optim.warmup_epochs: the warm-up of {optim.warmup_epochs:g} epochs is as long as "
            f"the run of {optim.epochs}, so the learning rate never falls; a tenth of the run is "
            "usual"
        )
    if optim.precision == "bf16" and on_cpu and not has_bf16():
        yield (
            "optim.precision: bf16 is slow here, since this CPU has no instructions for it; "
            "optim.precision=fp32 is faster"
        )
    # The embedded settings for the digits were chosen for their few steps.
    if optim.name == "lars" and steps < FEW_STEPS and config.data.name != "digits":
        yield (
            f"optim.epochs: {steps} steps in all ({optim.epochs} epochs of {steps_per_epoch}) are "
            f"few for LARS, whose published recipes take tens of thousands; more epochs, a smaller "
            "data.batch_size or optim.name=adamw with optim.lr=1e-3 help"
        )
