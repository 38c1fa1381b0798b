"""The formulas written out in plain loops, as slow and as literal as possible."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor


def nt_xent(za: Tensor, zb: Tensor, temperature: float) -> float:
    """2N anchors, self excluded, the positive in the denominator."""
    rows = [z / z.norm().clamp(min=1e-12) for z in torch.cat([za, zb])]
    n, total = len(za), 0.0
    for i, u in enumerate(rows):
        positive = (i + n) % (2 * n)
        scores = [float(u @ v) / temperature for v in rows]
        largest = max(scores)
        rest = sum(math.exp(s - largest) for j, s in enumerate(scores) if j != i)
        total += -scores[positive] + largest + math.log(rest)
    return total / (2 * n)


def info_nce(z: Tensor, temperature: float) -> float:
    """The mean over pairs of views."""
    pairs = list(combinations(range(len(z)), 2))
    return sum(nt_xent(z[a], z[b], temperature) for a, b in pairs) / len(pairs)


def vicreg(z: Tensor) -> tuple[float, float, float]:
    """Invariance over pairs of views, summed variance and covariance of two branches."""
    views, n, d = z.shape
    pairs = list(combinations(range(views), 2))
    invariance = 0.0
    for a, b in pairs:
        for i in range(n):
            for j in range(d):
                invariance += float(z[a, i, j] - z[b, i, j]) ** 2 / (n * d) / len(pairs)
    variance = covariance = 0.0
    for view in z:
        columns = [[float(view[i, j]) for i in range(n)] for j in range(d)]
        means = [sum(c) / n for c in columns]
        cov = [
            [
                sum((columns[p][i] - means[p]) * (columns[q][i] - means[q]) for i in range(n))
                / (n - 1)
                for q in range(d)
            ]
            for p in range(d)
        ]
        variance += sum(max(0, 1 - math.sqrt(cov[j][j] + 1e-4)) for j in range(d)) / d
        covariance += sum(cov[p][q] ** 2 for p in range(d) for q in range(d) if p != q) / d
    return invariance, variance * 2 / views, covariance * 2 / views


def renyi2(a: Tensor) -> float:
    """-log(|A|_F^2 / M^2)."""
    return -math.log(sum(float(x) ** 2 for x in a.flatten()) / a.shape[0] ** 2)


def mutual_information(r: Tensor, z: Tensor) -> float:
    """H(A) + H(B) - H(A o B) from the Gram matrices of the normalised rows."""
    r, z = (x.flatten(0, 1) / x.flatten(0, 1).norm(dim=1, keepdim=True) for x in (r, z))
    a, b = r @ r.T, z @ z.T
    return renyi2(a) + renyi2(b) - renyi2(a * b)
