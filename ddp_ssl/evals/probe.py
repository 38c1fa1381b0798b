"""The online linear probe, trained beside the method on detached representations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl.data.batch import Batch
from ddp_ssl.methods.base import Method


class Learner(nn.Module):
    """The method and, where there are labels, a linear probe: what DDP wraps."""

    def __init__(self, method: Method[Any], num_classes: int) -> None:
        super().__init__()
        self.method = method
        self.probe = nn.Linear(method.feature_width, num_classes) if num_classes else None

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The sum to differentiate, and the figures of this step (`loss` without the probe's)."""
        out = self.method(batch)
        figures: dict[str, Tensor | float] = {"loss": out.loss, **out.terms}
        total = out.loss
        if self.probe is not None:
            loss, top1 = self._probe(out.features, batch.labels)
            figures |= {"probe_loss": loss, "probe_top1": top1}
            total = total + loss
        return total, figures

    def _probe(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and top-1 averaged over the views `[k, n, d_R]`."""
        assert self.probe is not None
        with torch.autocast(features.device.type, enabled=False):
            logits = self.probe(features.detach().to(self.probe.weight.dtype)).flatten(0, 1)
            target = labels.repeat(features.shape[0])
            # All labels of a labelled data set are known, so every rank averages over n.
            loss = F.cross_entropy(logits, target)
            return loss, (logits.detach().argmax(1) == target).to(loss.dtype).mean()
