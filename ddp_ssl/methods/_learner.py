"""The online linear probe, trained beside the method on detached representations."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl.data.batch import Batch
from ddp_ssl.methods.base import Method
from ddp_ssl.utils import device_timer


class Learner(nn.Module):
    """The method and, if there are labels, a linear probe. DDP wraps this module."""

    def __init__(self, method: Method[Any], num_classes: int, some_unlabelled: bool = True) -> None:
        super().__init__()
        self.method, self.some_unlabelled = method, some_unlabelled
        self.probe = nn.Linear(method.feature_width, num_classes) if num_classes else None
        self.timing = False
        self.timed: tuple[Any, Any] | None = None
        """With `timing`: before and after a forward and backward of the probe alone."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The sum to differentiate, and this step's metrics (`train/loss` without the probe's)."""
        out = self.method(batch)
        named = {n if "/" in n else f"train/{n}": value for n, value in out.terms.items()}
        metrics: dict[str, Tensor | float] = {"train/loss": out.loss, **named}
        total = out.loss
        if self.probe is not None:
            loss, top1 = self._probe(out.features, batch.labels)
            metrics |= {"train/probe_loss": loss, "train/probe_top1": top1}
            total = total + loss
            if self.timing:
                self.timed = self._time(out.features.detach(), batch.labels)
        return total, metrics

    def _time(self, features: Tensor, labels: Tensor) -> tuple[Any, Any]:
        """Run the probe again: its backward cannot be timed within the step's."""
        assert self.probe is not None
        start = device_timer.now(features.device)
        loss, _ = self._probe(features, labels, self.method.comm.world_size / labels.numel())
        torch.autograd.grad(loss, [*self.probe.parameters()])
        return start, device_timer.now(features.device)

    def _probe(
        self, features: Tensor, labels: Tensor, scale: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and top-1 over the views `[k, n, d_R]` of the images with a label.

        Processes may hold different numbers of these (label -1: unknown). Each one's part is scaled
        so that the mean over processes is the mean over all labelled images of the batch.
        """
        assert self.probe is not None
        with torch.autocast(features.device.type, enabled=False):
            logits = self.probe(features.detach().to(self.probe.weight.dtype)).flatten(0, 1)
            target = labels.repeat(features.shape[0])
            if scale is None and self.some_unlabelled:  # the numbers of labels may differ
                comm, labelled = self.method.comm, (target >= 0).sum().to(logits.dtype)
                scale = comm.world_size / comm.sum(labelled).clamp(min=1)
            elif scale is None:
                scale = 1 / len(target)
            loss = scale * F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
            # -1 is never the argmax.
            correct = (logits.detach().argmax(1) == target).sum().to(loss.dtype)
            return loss, scale * correct
