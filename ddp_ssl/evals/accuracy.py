"""Accuracies from scores, over all processes, and their confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from ddp_ssl.comm import Comm

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Accuracy:
    """Fractions of the images that are classified correctly."""

    top1: float
    top5: float | None  # None for five classes or fewer
    per_class: tuple[float, ...]  # top-1 of each class's images; NaN for a class without images
    correct: int
    images: int


class Tally:
    """Counts correct answers per class on this process's images; `accuracy` adds all processes'."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = torch.zeros(3, classes, dtype=torch.float64)  # top-1, top-5, images

    def add(self, scores: Tensor, labels: Tensor, possible: Tensor | None = None) -> None:
        """Count scores `[n, classes]` against labels `[n]`.

        `possible` `[n]`: whether the true class may count. In k-NN a class without a vote does not,
        wherever it is ranked.
        """
        if not len(labels):
            return
        # Here, so that `--help` does not wait for torchvision, which it imports.
        from torchmetrics.functional.classification import multiclass_stat_scores

        scores, labels = scores.detach().float().nan_to_num(-math.inf), labels.to(scores.device)
        if possible is not None:
            last = torch.full_like(labels, -1, dtype=scores.dtype)[:, None]
            true = scores.gather(1, labels[:, None])
            scores = scores.scatter(1, labels[:, None], true.where(possible[:, None], last))
        for row, k in enumerate((1, 5) if self.classes > 5 else (1,)):
            found = multiclass_stat_scores(
                scores, labels, self.classes, top_k=k, average="none", validate_args=False
            ).view(self.classes, 5)
            self.counts[row] += found[:, 0].cpu()
        self.counts[2] += labels.cpu().bincount(minlength=self.classes)

    def accuracy(self, comm: Comm, device: torch.device) -> Accuracy:
        """The accuracy over all processes."""
        first, fifth, images = comm.sum(self.counts.to(device)).cpu()
        total = max(float(images.sum()), 1.0)
        return Accuracy(
            top1=float(first.sum()) / total,
            top5=float(fifth.sum()) / total if self.classes > 5 else None,
            per_class=tuple((first / images).tolist()),
            correct=int(first.sum()),
            images=int(images.sum()),
        )


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


def over_images(result: Sequence[Accuracy]) -> Interval:
    """Wilson's interval of the mean top-1: the spread over draws of as many test images."""
    images = max(result[0].images, 1)
    correct = round(sum(r.correct for r in result) / len(result))
    found = stats.binomtest(correct, images).proportion_ci(CONFIDENCE, "wilson")
    return Interval(float(found.low), float(found.high))


def over_seeds(result: Sequence[Accuracy]) -> tuple[float, Interval] | None:
    """Standard deviation of top-1 over seeds and Student's t interval of its mean; None for one."""
    if len(result) < 2:
        return None
    values = torch.tensor([r.top1 for r in result], dtype=torch.float64)
    mean, sd = float(values.mean()), float(values.std())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return sd, Interval(mean - half, mean + half)
