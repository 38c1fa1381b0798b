"""AdaDim's Figure 1c: 200 points on a sphere, first in more dimensions, then more uniform.

R are unit vectors in three dimensions, Z their projection to two of them. *Decorrelation*: the
third coordinate grows from nothing, so that R goes from a circle to the sphere and Z from a line to
the plane. *Spread*: R goes from five clusters on the sphere to uniform points. The paper has a
picture and words; clusters, steps and repetitions are ours. Beside it the uniformity and the
covariance of uniform points, by number and dimension, with their closed forms.
"""

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ddp_ssl.metrics import effective_rank, pair_means, renyi_entropy
from ddp_ssl.reproduction import figures
from ddp_ssl.reproduction.example import Claim, run

POINTS, CLUSTERS = 200, 5
STEPS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
FROM = 0.05  # of the way from the clusters' centres: at 0 all points of one are equal
NUMBERS, DIMENSIONS = (50, 200, 1000), (2, 3, 8, 32, 128)


def unit(x: Tensor) -> Tensor:
    """Rows of length one."""
    rows: Tensor = x / x.norm(dim=1, keepdim=True)
    return rows


def decorrelated(share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """R `[200, 3]`, its third coordinate `share` of a sphere's; Z has the first and the third."""
    x = torch.randn(POINTS, 3, generator=generator, dtype=torch.float64)
    r = unit(x * torch.tensor([1, 1, share], dtype=torch.float64))
    return r, r[:, [0, 2]]


def spread(share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """R `[200, 3]`, `share` of the way from the clusters' centres to uniform points; Z without the
    third coordinate."""
    centres = unit(torch.randn(CLUSTERS, 3, generator=generator, dtype=torch.float64))
    x = unit(torch.randn(POINTS, 3, generator=generator, dtype=torch.float64))
    way = FROM + (1 - FROM) * share
    r = unit((1 - way) * centres[torch.arange(POINTS) % CLUSTERS] + way * x)
    return r, r[:, :2]


PHASES = {"decorrelation": decorrelated, "spread": spread}


def describe(r: Tensor, z: Tensor) -> list[float]:
    """Effective rank of R, entropy of R and I(R;Z) of order 2 in nats, uniformity of R and of Z."""
    pairs = pair_means(r, z)
    return [float(effective_rank(r)), renyi_entropy(r), pairs.mutual_information,
            pairs.uniformity_r, pairs.uniformity_z]  # fmt: skip


def uniform_uniformity(dimension: int) -> float:
    """Of infinitely many uniform points: log E exp(-2 |u - v|^2) = log 0F1(d/2, 4) - 4."""
    from scipy.special import hyp0f1

    return math.log(float(hyp0f1(dimension / 2, 4))) - 4


def uniform_covariance(number: int, dimension: int) -> float:
    """Root mean square of X^T X / n off its diagonal, over the diagonal's 1 / d."""
    return math.sqrt(dimension / (number * (dimension + 2)))


def covariance(x: Tensor) -> float:
    """The square of the same for `x` `[n, d]`, for a mean over draws."""
    moment = x.T @ x / len(x) * x.shape[1]
    size = len(moment)
    return float((moment - moment.diagonal().diag()).square().sum() / (size * (size - 1)))


@dataclass(frozen=True)
class Found:
    """Means over repetitions."""

    phases: dict[str, Tensor]  # `[steps, measures]`
    uniformity: Tensor  # uniformity of uniform points `[numbers, dimensions]`
    covariance: Tensor
    repetitions: int


def measure(repetitions: int) -> Found:
    """The numbers for the picture and the text."""
    phases = {
        name: torch.tensor([
            [describe(*make(step, torch.Generator().manual_seed(seed))) for step in STEPS]
            for seed in range(repetitions)
        ], dtype=torch.float64).mean(0)
        for name, make in PHASES.items()
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    potential = torch.zeros(len(NUMBERS), len(DIMENSIONS), dtype=torch.float64)
    squares = torch.zeros_like(potential)
    for i, number in enumerate(NUMBERS):
        for j, dimension in enumerate(DIMENSIONS):
            for _ in range(repetitions):
                x = unit(torch.randn(number, dimension, generator=generator, dtype=torch.float64))
                distances = 2 - 2 * (x @ x.T)
                off = torch.exp(-2 * distances).sum() - number
                potential[i, j] += off / (number * (number - 1)) / repetitions
                squares[i, j] += covariance(x) / repetitions
    return Found(phases, potential.log(), squares.sqrt(), repetitions)


def checks(found: Found) -> list[Claim]:
    """The paper's claims, what was found, and whether they agree."""
    first, second = (found.phases[name].T.tolist() for name in PHASES)
    rank, _, gained, *_ = first
    _, entropy, information, of_r, of_z = second
    gain = gained[-1] - gained[0]

    def rises(values: list[float], slack: float = 0) -> bool:
        return all(y > x - slack for x, y in pairwise(values))

    def listed(values: list[float], digits: int = 2) -> str:
        return ", ".join(f"{v:.{digits}f}" for v in values)

    expected = torch.tensor([uniform_uniformity(d) for d in DIMENSIONS], dtype=torch.float64)
    off = float((found.uniformity - expected).abs().max())
    closed = torch.tensor([[uniform_covariance(n, d) for d in DIMENSIONS] for n in NUMBERS])
    ratio = found.covariance / closed
    # Squares of d (d - 1) / 2 nearly independent numbers in every draw.
    draws = torch.tensor([d * (d - 1) / 2 * found.repetitions for d in DIMENSIONS])
    return [
        ("decorrelation: R has more dimensions and I(R;Z) rises with them",
         f"effective rank {listed(rank)}; I(R;Z) {listed(gained, 3)}",
         rises(rank) and rises(gained)),
        ("spread: H(R) rises in the same dimensions",
         f"entropy of R {listed(entropy)}", rises(entropy, 0.01)),
        ("spread: Z does not spread to the same degree",
         f"uniformity of R {listed(of_r)}, of Z {listed(of_z)}",
         of_r[0] - of_r[-1] > 1.3 * (of_z[0] - of_z[-1]) > 0),
        ("spread: I(R;Z) levels off or falls",
         f"{listed(information, 3)}: it moves by {max(information) - min(information):.3f} and "
         f"ends {information[-1] - information[0]:+.3f} off; decorrelation gained {gain:.3f}",
         max(information) - min(information) < 0.2 * gain),
        ("uniform points: uniformity falls with the dimension, towards -4, at any number",
         f"{listed(found.uniformity[1].tolist())} for {POINTS} points in "
         f"{', '.join(map(str, DIMENSIONS))} dimensions; {off:.3f} from the closed form at most",
         rises([-v for v in found.uniformity[1].tolist()]) and off < 0.05),
        ("uniform points: covariances fall with the number, hardly with the dimension",
         "; ".join(f"{n} points {listed(row.tolist(), 3)}"
                   for n, row in zip(NUMBERS, found.covariance, strict=True))
         + f" of the variance; {float(ratio.min()):.2f} to {float(ratio.max()):.2f} of the closed "
         "form", bool(((ratio - 1).abs() < 0.02 + 4 / (2 * draws).sqrt()).all())),
    ]  # fmt: skip


def draw(found: Found, file: Path) -> None:
    """Points at the start, between the phases and at the end; the measures; uniform points."""
    pyplot = figures.pyplot()
    figure = pyplot.figure(figsize=(16, 7.5))
    scenes = (
        ("R on a circle", decorrelated, 0.0), ("R on the sphere", decorrelated, 1.0),
        ("R in clusters", spread, 0.0), ("R uniform", spread, 1.0),
    )  # fmt: skip
    for place, (title, make, step) in enumerate(scenes, 1):
        axis = figure.add_subplot(2, 4, place, projection="3d")
        r, _ = make(step, torch.Generator().manual_seed(0))
        axis.scatter(*r.T.tolist(), s=8)
        axis.set(title=title, xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1),
                 xticks=[], yticks=[], zticks=[])  # fmt: skip
    for place, (name, values) in enumerate(found.phases.items(), 5):
        axis = figure.add_subplot(2, 4, place)
        for index, label in ((1, "entropy of R"), (2, "I(R;Z)")):
            axis.plot(STEPS, values[:, index].tolist(), marker="o", label=f"{label}, nats")
        for index, label in ((3, "uniformity of R"), (4, "uniformity of Z")):
            axis.plot(STEPS, values[:, index].tolist(), marker="s", linestyle="--", label=label)
        axis.set(title=name, xlabel="share of the way", ylim=(-2.3, 1.4))
        axis.legend(fontsize=8, loc="center right")
    axis = figure.add_subplot(2, 4, 7)
    for number, row in zip(NUMBERS, found.uniformity, strict=True):
        axis.plot(DIMENSIONS, row.tolist(), marker="o", label=f"{number} points")
    closed = [uniform_uniformity(d) for d in DIMENSIONS]
    axis.plot(DIMENSIONS, closed, "--", color="gray", label="closed form")
    axis.set(title="uniform points: uniformity", xlabel="dimension", xscale="log")
    axis.legend(fontsize=8)
    axis = figure.add_subplot(2, 4, 8)
    for dimension, column in zip(DIMENSIONS, found.covariance.T, strict=True):
        axis.plot(NUMBERS, column.tolist(), marker="o", label=f"{dimension} dimensions")
    axis.set(title="uniform points: covariance over variance", xlabel="points", xscale="log",
             yscale="log")  # fmt: skip
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> int:
    title = "Points on a sphere"
    return run("figure1c", title, ("repetitions", 50), measure, checks, draw)


if __name__ == "__main__":
    sys.exit(main())
