"""A run folder with one checkpoint, made without training."""

from __future__ import annotations

from pathlib import Path

import torch

from ddp_ssl.checkpoint import store
from ddp_ssl.config import Resolved
from ddp_ssl.data.datasets import registry
from ddp_ssl.methods._learner import Learner
from ddp_ssl.models import export
from ddp_ssl.run.configure import DIGITS, load
from tests.helpers import TINY, method_of

DATA = ("data.val_fraction=0.3", "eval.batch_size=16")


def make_run(folder: Path, photos: Path, *overrides: str) -> Learner:
    """A run on `photos` that ended at step 7; the newest checkpoint differs from the best."""
    data = ("data.name=folder", f"data.root={photos}")
    base = str(DIGITS / "default.yaml")
    resolved: Resolved = load([base, *TINY, *data, *DATA, *overrides])
    config = resolved.config
    learner = Learner(method_of(config, dtype=torch.float32), 4)
    val = registry.load(config.data, config.run.seed).val
    identity = {"validation images": "none" if val is None else val.digest[:12]}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved.to_yaml())
    (folder / "metrics.jsonl").write_text('{"step": 7, "epoch": 1}\n')
    for step in (5, 7):
        torch.nn.init.constant_(learner.probe.bias, step)
        backbone = learner.method.backbone
        norm = backbone.bn1 if hasattr(backbone, "bn1") else backbone.norm  # a ViT's
        torch.nn.init.constant_(norm.bias, step / 10)
        path = store.save(
            folder,
            {"model": learner.state_dict(), "step": step, "epoch": 1, "identity": identity},
            step=step, epoch=1, identity=identity, world_size=1, keep=2,
        )  # fmt: skip
        if step == 5:
            store.save_best(folder, path)
    torch.save(export(learner.method.backbone), folder / "backbone.pt")
    return learner.eval()
