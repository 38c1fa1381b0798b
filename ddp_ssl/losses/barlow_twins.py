"""Barlow Twins over the global batch, for two views and for many."""

from typing import NamedTuple

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import Route, at_least_float32, check_views, unit_rows
from ddp_ssl.losses.kernels.barlow_twins import pair_terms
from ddp_ssl.losses.kernels.rows import Rows, rows_of


class Correlation(NamedTuple):
    """Squared distance of a cross-correlation matrix from the identity, in two parts."""

    on_diagonal: Tensor
    off_diagonal: Tensor


def barlow_twins(
    z: Tensor,
    off_diagonal: float = 0.0051,
    scale: float = 0.1,
    *,
    route: Route = "auto",
    eps: float = 1e-5,
    comm: Comm = ONE_PROCESS,
) -> Tensor:
    """Barlow Twins for K >= 2 views: the mean over all pairs of views; at K = 2 the published loss.

        loss = scale * [ sum_j (C_jj - 1)^2 + off_diagonal * sum_{j != l} C_jl^2 ],  C = A^T B / N

    A and B are two views, each feature of each view standardised over the global batch (biased
    variance, `eps` under the root).

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns a scalar in float32
    or float64: the full loss on every process. `route`: see `losses.common.gathers`. Raises
    `ValueError` for one view or one image.

    Source: Zbontar et al. 2021, Eq. 1 and 2. The published recipe was tuned with the gradient
    divided by the number of processes W: its code all-reduces C in place, which autograd does not
    see. Here the gradient is the loss's own, at any W. `scale / W` (0.05 for solo-learn's two GPUs)
    gives the published training.
    """
    terms = pair_correlations(z, route=route, eps=eps, comm=comm)
    return scale * (terms.on_diagonal + off_diagonal * terms.off_diagonal)


def pair_correlations(
    z: Tensor, *, route: Route = "auto", eps: float = 1e-5, comm: Comm = ONE_PROCESS
) -> Correlation:
    """The two terms of `barlow_twins`, unweighted."""
    _, images = check_views("barlow_twins", z, comm)
    with torch.autocast(z.device.type, enabled=False):
        return Correlation(*pair_terms(z, images, route, eps, comm))


def barlow_twins_multiview(
    z: Tensor,
    off_diagonal: float,
    *,
    l2_first: bool = True,
    route: Route = "auto",
    eps: float = 1e-12,
    comm: Comm = ONE_PROCESS,
) -> Tensor:
    """Barlow Twins of K views against their mean, in O(K), as fastssl defines it.

        loss = mean over k of sum_j (Z_k^T M / N - 1)_jj^2
               + off_diagonal * sum_{j != l} (M^T M / N)_jl^2

    M is the mean over views, Z_k included. Rows are scaled to length one first (`l2_first`), then
    each feature is standardised over all K N rows (unbiased variance). At K = 2 C = Z_0^T Z_1 / N
    takes the place of both matrices.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns a scalar in float32
    or float64: the full loss on every process. `route`: see `losses.common.gathers`. Raises
    `ValueError` for one view or one image.

    Source: Ghosh et al. 2023 (small projectors and multiple views), fastssl. Two differences:
    statistics are over the global batch, and `eps` under the root gives a constant feature a
    standard deviation (fastssl has none; it must be small, since variances are about 1/d after
    `l2_first`).
    """
    terms = mean_correlations(z, l2_first=l2_first, route=route, eps=eps, comm=comm)
    return terms.on_diagonal + off_diagonal * terms.off_diagonal


def mean_correlations(
    z: Tensor,
    *,
    l2_first: bool = True,
    route: Route = "auto",
    eps: float = 1e-12,
    comm: Comm = ONE_PROCESS,
) -> Correlation:
    """The two terms of `barlow_twins_multiview`, unweighted."""
    views, images = check_views("barlow_twins_multiview", z, comm)
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        rows = rows_of(unit_rows(z) if l2_first else z, route, comm)
        count = views * images
        centred = rows.values - rows.total(rows.values.sum((0, 1))) / count
        variance = rows.total(centred.square().sum((0, 1))) / (count - 1)
        unit = centred * (variance + eps).rsqrt()
        if views == 2:
            return _correlation(rows, unit[0], unit[1])
        mean = unit.mean(0)
        diagonals = rows.total((unit * mean).sum(1)) / images  # [K, d]
        on = (diagonals - 1).square().sum(1).mean()
        return Correlation(on, _correlation(rows, mean, mean).off_diagonal)


def _correlation(rows: Rows, a: Tensor, b: Tensor) -> Correlation:
    """Both terms of C = A^T B / N for `a` and `b` `[m, d]` that belong to `rows`."""
    diagonal = rows.total((a * b).sum(0)) / rows.images
    squares = rows.squared_product(a, b) / rows.images**2
    return Correlation((diagonal - 1).square().sum(), squares - diagonal.square().sum())
