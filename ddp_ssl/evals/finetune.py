"""Fine-tuning: the whole network is trained on a share of the labels."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl import distributed, optim
from ddp_ssl.config import ConfigError, Optim
from ddp_ssl.data.datasets import selection
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import ViewLayout, World
from ddp_ssl.evals.accuracy import Accuracy
from ddp_ssl.evals.features import Extractor
from ddp_ssl.evals.linear import fitting_batch, random_crops, score
from ddp_ssl.evals.settings import EvaluateConfig
from ddp_ssl.evals.weights import seeded
from ddp_ssl.methods.base import trainable
from ddp_ssl.utils.progress import Ticker
from ddp_ssl.utils.seeds import hashed


class Classifier(nn.Module):
    """Backbone and linear head: `[n, 3, S, S] -> [n, classes]`."""

    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.backbone(x).flatten(1))
        return logits


@dataclass(frozen=True)
class FinetuneResult:
    """Accuracies of one seed."""

    seed: int
    test: Accuracy
    images: int  # number of training images
    batch_size: int
    steps: int
    loss: float  # mean training loss of the last epoch


def evaluate_finetune(
    extractor: Extractor, train: Split, val: Split, classes: int, world: World
) -> list[FinetuneResult]:
    """Train and test with every seed, each from the pretrained weights; on all processes."""
    return [
        _one_seed(extractor, train, val, classes, world, seed)
        for seed in extractor.settings.finetune.seeds
    ]


def _one_seed(
    extractor: Extractor, train: Split, val: Split, classes: int, world: World, seed: int
) -> FinetuneResult:
    settings, device, comm = extractor.settings, extractor.device, extractor.comm
    f = settings.finetune
    if f.fraction < 1:
        chosen = selection.fraction_of(train.labels, f.fraction, seed)
        train = train.subset(np.flatnonzero(chosen))
    batch = fitting_batch(extractor, "finetune", f.batch_size, len(train))
    if batch == 0:
        raise ConfigError(
            f"finetune.fraction: {f.fraction} leaves {len(train)} images for {world.size} processes"
        )
    with seeded(hashed(seed, "finetune")):
        model = Classifier(copy.deepcopy(extractor.backbone), extractor.width, classes)
    layout = _global_norm(model)
    model.to(device).requires_grad_(True)
    if settings.model.channels_last:
        model.to(memory_format=torch.channels_last)
    if f.backbone_lr == 0:
        model.backbone.requires_grad_(False)
    loader = random_crops(extractor, train, batch, seed)
    total = f.epochs * loader.steps_per_epoch
    loss = _train(model, layout, loader, settings, batch, world, f"fine-tuning, seed {seed}, steps")
    loader.close()
    tester = Extractor(model, classes, settings, comm, device, bad=extractor.bad)
    logits = tester.features(val)
    accuracy = score(nn.Identity(), logits, classes, comm, device)
    return FinetuneResult(seed, accuracy, len(train), batch, total, loss)


def _train(
    model: Classifier,
    layout: ViewLayout,
    loader: Any,
    settings: EvaluateConfig,
    batch: int,
    world: World,
    what: str,
) -> float:
    """Train all epochs; returns the last one's mean loss over all processes.

    Raises `ConfigError` if the loss is not finite.
    """
    f, device = settings.finetune, world.device
    schedule = Optim(
        name=f.optimizer,
        lr=f.lr,
        epochs=f.epochs,
        warmup_epochs=f.warmup_epochs,
        warmup_lr=0.0,
        weight_decay=f.weight_decay,
        layer_decay=f.layer_decay,
    )
    groups: list[dict[str, Any]] = [
        {"name": "head", "params": trainable(model.head, "head.")},
        {
            "name": "backbone",
            "params": trainable(model.backbone, "backbone."),
            "base_lr": f.lr * f.backbone_lr,
        },
    ]
    module = distributed.data_parallel(model, world).train()
    optimizer = optim.build(schedule, groups, getattr(model.backbone, "vit", model.backbone))
    autocast = f.precision == "bf16"
    ticker = Ticker(what, f.epochs * loader.steps_per_epoch, world.is_main)
    mean = math.nan
    for epoch in range(f.epochs):
        losses = torch.zeros((), device=device)
        for step in range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch):
            inputs = next(loader)
            optim.set_learning_rates(optimizer, schedule, batch, step, loader.steps_per_epoch)
            with (
                distributed.stacked_views(layout, 1, slice(None)),
                torch.autocast(device.type, torch.bfloat16, autocast),
            ):
                logits = module(inputs.views[0])
            loss = F.cross_entropy(logits.float(), inputs.labels, label_smoothing=f.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses += loss.detach()
            ticker.at(step + 1)
        mean = float(world.mean_rows(losses)) / loader.steps_per_epoch
        if not math.isfinite(mean):
            raise ConfigError(
                f"finetune.lr: with {f.lr:g} the loss is {mean} in epoch {epoch + 1}; "
                "a lower one would be accepted"
            )
    return mean


def _global_norm(model: Classifier) -> ViewLayout:
    """Make the batch norms those of the global batch, as in pretraining; returns their layout.

    So the result does not depend on the number of processes.
    """
    norms = [m for m in model.modules() if isinstance(m, distributed.GlobalBatchNorm)]
    layout = norms[0].layout if norms else ViewLayout()
    for norm in norms:
        norm.reduce = True
    if not norms:
        distributed.global_batch_norm(model, layout)
    return layout
