"""Accuracies from scores, over all processes, and their confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.evals.features import gather_rows

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Accuracy:
    """Fractions of the images that are classified correctly."""

    top1: float
    top5: float | None  # None for five classes or fewer
    per_class: tuple[float, ...]  # top-1 of each class's images; NaN for a class without images
    correct: int
    images: int
    right: bytes = b""
    """A bit for each image, in their order: whether it is classified correctly."""


class Tally:
    """Counts correct answers per class on this process's images; `accuracy` adds all processes'."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = torch.zeros(3, classes, dtype=torch.float64)  # top-1, top-5, images
        self.right = [torch.zeros(0, dtype=torch.uint8)]

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
        self.right.append((scores.argmax(1) == labels).to("cpu", torch.uint8))
        self.counts[2] += labels.cpu().bincount(minlength=self.classes)

    def accuracy(self, comm: Comm, device: torch.device) -> Accuracy:
        """The accuracy over all processes."""
        right = gather_rows(torch.cat(self.right), comm, device).numpy()
        first, fifth, images = comm.sum(self.counts.to(device)).cpu()
        total = max(float(images.sum()), 1.0)
        return Accuracy(
            top1=float(first.sum()) / total,
            top5=float(fifth.sum()) / total if self.classes > 5 else None,
            per_class=tuple((first / images).tolist()),
            correct=int(first.sum()),
            images=int(images.sum()),
            right=np.packbits(right).tobytes(),
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
    values = np.array([r.top1 for r in result])
    mean, half = float(values.mean()), _half(values)
    return float(values.std(ddof=1)), Interval(mean - half, mean + half)


def over_both(result: Sequence[Accuracy]) -> Interval:
    """The interval of the mean top-1 over draws of the test images and over seeds together.

    The squares of the two distances from the mean are added, on each side.
    """
    images, seeds = over_images(result), over_seeds(result)
    if seeds is None:
        return images
    mean = sum(r.top1 for r in result) / len(result)
    low, high = (
        math.hypot(getattr(images, side) - mean, getattr(seeds[1], side) - mean)
        for side in ("low", "high")
    )
    return Interval(max(mean - low, 0.0), min(mean + high, 1.0))


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[float, Interval]:
    """Mean of `a - b`, both `[seeds, images]` of 0 and 1, and its interval over both.

    The same images and seeds stand at the same place, so that what is hard for both does not count.
    """
    each = a.astype(np.float64) - b
    mean = float(each.mean())
    half = math.hypot(_half(each.mean(0)), _half(each.mean(1)))
    return mean, Interval(mean - half, mean + half)


def _half(values: NDArray[np.float64]) -> float:
    """Half of Student's t interval of a mean; 0 for one value."""
    if len(values) < 2:
        return 0.0
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
