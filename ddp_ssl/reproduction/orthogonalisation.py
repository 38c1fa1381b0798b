"""Weak against strong orthogonalisation: what gradient descent learns in two dimensions.

The setting of Ghosh et al. 2024, Theorem 3.2 and appendix B: a linear network W of d outputs on
two-dimensional data, a small start, the Barlow Twins loss sum_i (C_ii - 1)^2 + beta sum_{i != j}
C_ij^2 with C = W Gamma W^T, Gamma being the correlation of two augmentations of an image. The
paper has animations without numbers; here their claims are checked in figures.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddp_ssl.reproduction import figures
from ddp_ssl.reproduction.example import run

STRENGTHS = (0.0, 1e-3, 1e-2, 0.1, 0.3, 1.0)
WIDTHS = (2, 4, 8, 16, 32)
EIGENVALUES = (1.0, 0.5)
ANGLE = math.radians(30)  # of the leading eigenvector
START, RATE, STEPS = 1e-3, 0.01, 3000
WEAK, STRONG = STRENGTHS[1], STRENGTHS[-1]


def gamma(images: int = 20_000, seed: int = 0) -> Tensor:
    """Correlation of two augmentations, estimated: x plus noise that has its own directions."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.tensor(
        [[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]]
    )
    scale = torch.tensor(EIGENVALUES).sqrt()
    x = torch.randn(images, 2, generator=generator, dtype=torch.float64) * scale
    x = x @ rotation.T.double()
    noise = torch.tensor([0.3, 0.6], dtype=torch.float64)
    first, second = (
        x + torch.randn(images, 2, generator=generator, dtype=torch.float64) * noise
        for _ in range(2)
    )
    return (first.T @ second + second.T @ first) / (2 * images)


def train(
    matrix: Tensor, width: int, beta: float, seeds: int, steps: int = STEPS, start: float = START
) -> Tensor:
    """Weights in the eigenbasis, leading direction first: `[steps + 1, seeds, width, 2]`."""
    generator = torch.Generator().manual_seed(1)
    shape = (seeds, width, 2)
    w = start * torch.randn(shape, generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    vectors = vectors[:, values.argsort(descending=True)]
    diagonal = torch.eye(width, dtype=torch.bool)
    path = [w]
    for _ in range(steps):
        w = w.detach().requires_grad_()
        c = w @ matrix @ w.mT
        on = (c.diagonal(dim1=-2, dim2=-1) - 1).square().sum()
        off = c.masked_fill(diagonal, 0).square().sum()
        (gradient,) = torch.autograd.grad(on + beta * off, w)
        w = w.detach() - RATE * gradient
        path.append(w)
    paths: Tensor = torch.stack(path) @ vectors
    return paths


def effective_rank(weights: Tensor, matrix: Tensor) -> Tensor:
    """Effective rank of W Gamma^(1/2), the outputs, for weights W `[..., d, 2]`."""
    values = torch.linalg.eigvalsh(matrix).flip(0)
    singular = torch.linalg.svdvals(weights * values.clamp(min=0).sqrt())
    p = singular / singular.sum(-1, keepdim=True)
    rank: Tensor = torch.special.entr(p).sum(-1).exp()
    return rank


def growth_gap(path: Tensor, matrix: Tensor) -> float:
    """Without orthogonalisation each row keeps log|z_1 / z_1(0)| / lambda_1 = the same of 2.

    (From appendix B's equations for beta = 0.) The largest relative deviation over rows and steps.
    """
    values = torch.linalg.eigvalsh(matrix).flip(0)
    grown = (path[1:] / path[0]).abs().log() / values
    later = grown[len(grown) // 20 :]
    gap = (later[..., 0] - later[..., 1]).abs() / later.abs().amax(-1)
    return float(gap.max())


def learned_at(path: Tensor, matrix: Tensor) -> tuple[float, float]:
    """Steps after which the output's first and second singular value have half their last value."""
    values = torch.linalg.eigvalsh(matrix).flip(0)
    singular = torch.linalg.svdvals(path * values.sqrt())
    half = singular >= singular[-1] / 2
    first = half.float().argmax(0).double().mean(0)
    return float(first[0]), float(first[1])


def measure(seeds: int) -> dict[str, Any]:
    """Everything the picture and the text need."""
    matrix = gamma()
    narrow = {beta: train(matrix, 2, beta, seeds) for beta in STRENGTHS}
    wide = {
        width: effective_rank(train(matrix, width, WEAK, seeds)[-1], matrix) for width in WIDTHS
    }
    large = {
        width: effective_rank(train(matrix, width, WEAK, seeds, 3000, 0.1)[-1], matrix)
        for width in WIDTHS
    }
    shares = {
        beta: path[-1][..., 0].square() / path[-1].square().sum(-1) for beta, path in narrow.items()
    }
    first, second = learned_at(narrow[STRONG], matrix)
    return {
        "matrix": matrix,
        "paths": narrow,
        "rank": {beta: effective_rank(path[-1], matrix) for beta, path in narrow.items()},
        "share": shares,
        "gap": growth_gap(narrow[0.0], matrix),
        "steps": (first, second),
        "width": wide,
        "width_large_start": large,
    }


def checks(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """The paper's claims, what was found, and whether they agree."""
    rank, share = found["rank"], found["share"]
    wide, large = found["width"], found["width_large_start"]
    gap, (first, second) = found["gap"], found["steps"]
    weak, strong = rank[WEAK].mean().item(), rank[STRONG].mean().item()
    aligned, spread = share[WEAK].mean().item(), share[STRONG].mean().item()
    means = [rank[beta].mean().item() for beta in STRENGTHS]
    return [
        ("weak orthogonalisation: every output turns to the leading eigenvector",
         f"{100 * aligned:.1f} % of the squared weights are on it (beta {WEAK:g}; "
         f"{100 * spread:.0f} % with beta {STRONG:g}); effective rank {weak:.2f} of 2",
         aligned > 0.95 and weak < 1.2),
        ("strong orthogonalisation: the outputs span both eigenvectors",
         f"effective rank {strong:.3f} of 2 (beta {STRONG:g})", strong > 1.99),
        ("the stronger, the more dimensions at the same time",
         "effective rank " + ", ".join(f"{m:.2f}" for m in means) + " for beta "
         + ", ".join(f"{b:g}" for b in STRENGTHS),
         all(a <= b + 1e-3 for a, b in pairwise(means))),
        ("with beta = 0 a direction grows as its eigenvalue: log growth / eigenvalue is one number "
         "for both directions of an output",
         f"largest deviation {100 * gap:.2f} %", gap < 0.02),
        ("strong: the leading eigenvector is learned first",
         f"half of the last value after {first:.0f} steps, the second after {second:.0f}",
         first < second),
        ("weak: a wider projector keeps more of the second direction",
         "effective rank " + ", ".join(f"{wide[w].mean().item():.2f}" for w in WIDTHS)
         + " for " + ", ".join(map(str, WIDTHS)) + " outputs; from a larger start (0.1) "
         + ", ".join(f"{large[w].mean().item():.2f}" for w in WIDTHS),
         all(r[a].mean() < r[b].mean() for r in (wide, large)
             for a, b in pairwise(WIDTHS))),
    ]  # fmt: skip


def draw(found: dict[str, Any], file: Path) -> None:
    """Paths of two outputs, weak and strong; rank over beta and over width."""
    paths, rank = found["paths"], found["rank"]
    with figures.canvas(file, 1, 4, (16, 4), 130) as ((*axes,),):
        for axis, beta, name in zip(axes, (WEAK, STRONG), ("weak", "strong"), strict=False):
            for seed in range(5):
                for output, colour in enumerate(("tab:blue", "tab:orange")):
                    x, y = paths[beta][:, seed, output].T.numpy()
                    axis.plot(x, y, color=colour, linewidth=1, alpha=0.8)
                    axis.plot(x[-1], y[-1], "o", color=colour, markersize=5)
            axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.set(
                title=f"{name}: β = {beta:g}, five starts",
                xlabel="weight on the leading eigenvector",
                ylabel="weight on the second",
                xlim=(-1.6, 1.6),
                ylim=(-1.6, 1.6),
            )
        axis = axes[2]
        means = [rank[b].mean().item() for b in STRENGTHS]
        axis.errorbar(range(len(STRENGTHS)), means, [rank[b].std().item() for b in STRENGTHS],
                      marker="o", capsize=3)  # fmt: skip
        axis.set_xticks(range(len(STRENGTHS)), [f"{b:g}" for b in STRENGTHS])
        axis.set(title=f"two outputs after {STEPS} steps", xlabel="β", ylabel="effective rank",
                 ylim=(0.9, 2.1))  # fmt: skip
        axis = axes[3]
        for key, label in (("width", f"start {START:g}"), ("width_large_start", "start 0.1")):
            values = found[key]
            axis.errorbar(WIDTHS, [values[w].mean().item() for w in WIDTHS],
                          [values[w].std().item() for w in WIDTHS], marker="o", capsize=3,
                          label=label)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(WIDTHS, [str(w) for w in WIDTHS])
        axis.set(title=f"weak, β = {WEAK:g}", xlabel="outputs", ylabel="effective rank",
                 ylim=(0.9, 2.1))  # fmt: skip
        axis.legend()


def main() -> int:
    title = "Weak against strong orthogonalisation in two dimensions"
    return run("orthogonalisation", title, ("seeds", 50), measure, checks, draw)


if __name__ == "__main__":
    sys.exit(main())
