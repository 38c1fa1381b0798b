"""What goes beside the method: the online linear probe and the average of the weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl.data.batch import Batch
from ddp_ssl.methods._momentum import follow
from ddp_ssl.methods.base import Method, Progress
from ddp_ssl.utils import device_timer


class Learner(nn.Module):
    """The method and, if there are labels, a linear probe on its detached representations.

    `average` is the moving average of the backbone (`model.ema`). DDP wraps this module.
    """

    def __init__(self, method: Method[Any], num_classes: int, some_unlabelled: bool = True) -> None:
        super().__init__()
        self.method, self.some_unlabelled = method, some_unlabelled
        self.probe = nn.Linear(method.feature_width, num_classes) if num_classes else None
        self.average: nn.Module | None = None
        if method.ema is not None:
            self.average = copy.deepcopy(method.backbone).requires_grad_(False).eval()
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
            loss, top1 = self._probe(out.features, batch.labels, self.some_unlabelled)
            metrics |= {"train/probe_loss": loss, "train/probe_top1": top1}
            total = total + loss
            if self.timing:
                self.timed = self._time(out.features.detach(), batch.labels)
        return total, metrics

    def train(self, mode: bool = True) -> "Learner":
        """As any module; the average stays in eval mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """The method's, then the average's: parameters are averaged, buffers are the newest."""
        self.method.after_step(progress)
        if self.average is not None and self.method.ema is not None:
            keep = min(self.method.ema, (1 + progress.step) / (10 + progress.step))
            follow(self.average, self.method.backbone, keep)
            buffers = [*zip(self.average.buffers(), self.method.backbone.buffers(), strict=True)]
            for kind in {newest.dtype for _, newest in buffers}:  # one launch takes one type
                same = [pair for pair in buffers if pair[1].dtype == kind]
                torch._foreach_copy_([ours for ours, _ in same], [newest for _, newest in same])

    def _time(self, features: Tensor, labels: Tensor) -> tuple[Any, Any]:
        """Run the probe again: its backward cannot be timed within the step's."""
        assert self.probe is not None
        start = device_timer.now(features.device)
        loss, _ = self._probe(features, labels, weighted=False)
        torch.autograd.grad(loss, [*self.probe.parameters()])
        return start, device_timer.now(features.device)

    def _probe(self, features: Tensor, labels: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
        """Cross-entropy and top-1 over the views `[k, n, d_R]` of the images with a label.

        Processes may hold different numbers of these (label -1: unknown). Then each one's part is
        `weighted` so that the mean over processes is the mean over all labelled images.
        """
        assert self.probe is not None
        with torch.autocast(features.device.type, enabled=False):
            rows = features.detach().to(self.probe.weight.dtype).flatten(0, 1)
            logits, target = self.probe(rows), labels.repeat(features.shape[0])
            reduction = "sum" if weighted else "mean"
            loss = F.cross_entropy(logits, target, ignore_index=-1, reduction=reduction)
            correct = logits.detach().argmax(1) == target  # -1 is never the argmax
            if not weighted:
                return loss, correct.mean(dtype=loss.dtype)
            comm, labelled = self.method.comm, (target >= 0).sum(dtype=loss.dtype)
            scale = comm.world_size / comm.sum(labelled).clamp(min=1)
            return scale * loss, scale * correct.sum(dtype=loss.dtype)
