"""A run folder whose weights are all random, for what leaves the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddp_ssl.checkpoint import store
from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import load_method
from ddp_ssl.methods.base import Method
from ddp_ssl.run.configure import load
from ddp_ssl.run.identity import identity


def run_folder(place: Path, *overrides: str) -> tuple[Path, Method[Any]]:
    """A run folder with one checkpoint, and the method in it; all weights and averages random."""
    resolved = load(["model.projector=[24, 12]", *overrides])
    torch.manual_seed(1)
    method = load_method(resolved.config.method.name)(resolved.config, ONE_PROCESS)
    method.finish()
    for name, value in method.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.3)
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(resolved.to_yaml())
    state = {
        "model": Learner(method, 0).state_dict(),
        "step": 33,
        "epoch": 3,
        "identity": identity(resolved.config) | {"train images": "0123456789ab"},
        "latest": {"eval/knn_top1": 0.8125, "rep/effective_rank_r": 48.6283},
        "code": {"ddp_ssl": "0.1.0", "commit": "abc"},
        "ranks": [{}, {}],
    }
    store.save(place, state, step=33, epoch=3, identity=state["identity"], world_size=2, keep=2)
    return place, method.eval()
