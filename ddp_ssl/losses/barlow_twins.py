"""Barlow Twins over the global batch, for two views and for many."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import Route, Rows, at_least_float32, rows_of, unit_rows


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

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns a scalar in float32
    or float64: the full loss on every process.

    scale * [ sum_j (C_jj - 1)^2 + off_diagonal * sum_{j != l} C_jl^2 ] with C = A^T B / N, where A
    and B are two views, each feature of each view standardised over the global batch (biased
    variance, `eps` under the root). Source: Zbontar et al. 2021, Eq. 1 and 2.

    The published recipe was tuned with the gradient divided by the number of processes W: its code
    all-reduces C in place, which autograd does not see. Here the gradient is the loss's own, at any
    W. `scale / W` (0.05 for solo-learn's two GPUs) gives the published training. `route`: see
    `losses.common.gathers`. Raises `ValueError` for one view or one image.
    """
    terms = pair_correlations(z, route=route, eps=eps, comm=comm)
    return scale * (terms.on_diagonal + off_diagonal * terms.off_diagonal)


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

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns a scalar in float32
    or float64: the full loss on every process.

    Rows scaled to length one (`l2_first`), then each feature standardised over all K N rows
    (unbiased variance). At K = 2 sum_j (C_jj - 1)^2 + off_diagonal * sum_{j != l} C_jl^2 with
    C = A^T B / N. At K > 2 the first sum is the mean over views k of that of Z_k^T M / N and the
    second is of M^T M / N, where M is the mean over views, Z_k included: at K = 2 another loss than
    the branch above. Source: Ghosh et al. 2023 (small projectors and multiple views), fastssl.

    Differences: `eps` under the root, since a constant feature has no other standard deviation
    (after `l2_first` variances are about 1/d, so that it must be small; fastssl has none), and
    statistics over the global batch. Raises `ValueError` for one view or one image.
    """
    terms = mean_correlations(z, l2_first=l2_first, route=route, eps=eps, comm=comm)
    return terms.on_diagonal + off_diagonal * terms.off_diagonal


def pair_correlations(
    z: Tensor, *, route: Route = "auto", eps: float = 1e-5, comm: Comm = ONE_PROCESS
) -> Correlation:
    """The two terms of `barlow_twins`, unweighted."""
    _check("barlow_twins", z, comm)
    with torch.autocast(z.device.type, enabled=False):
        rows = rows_of(at_least_float32(z), route, comm)
        mean = rows.total(rows.values.sum(1)) / rows.images  # [K, d]
        centred = rows.values - mean[:, None]
        variance = rows.total(centred.square().sum(1)) / rows.images
        unit = centred * (variance + eps).rsqrt()[:, None]
        pairs = [_correlation(rows, unit[a], unit[b]) for a, b in combinations(range(len(unit)), 2)]
        on, off = (torch.stack(part).mean() for part in zip(*pairs, strict=True))
        return Correlation(on, off)


def mean_correlations(
    z: Tensor,
    *,
    l2_first: bool = True,
    route: Route = "auto",
    eps: float = 1e-12,
    comm: Comm = ONE_PROCESS,
) -> Correlation:
    """The two terms of `barlow_twins_multiview`, unweighted."""
    _check("barlow_twins_multiview", z, comm)
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        rows = rows_of(unit_rows(z) if l2_first else z, route, comm)
        views = rows.values.shape[0]
        count = views * rows.images
        centred = rows.values - rows.total(rows.values.sum((0, 1))) / count
        variance = rows.total(centred.square().sum((0, 1))) / (count - 1)
        unit = centred * (variance + eps).rsqrt()
        if views == 2:
            return _correlation(rows, unit[0], unit[1])
        mean = unit.mean(0)
        diagonals = rows.total((unit * mean).sum(1)) / rows.images  # [K, d]
        on = (diagonals - 1).square().sum(1).mean()
        return Correlation(on, _correlation(rows, mean, mean).off_diagonal)


def _correlation(rows: Rows, a: Tensor, b: Tensor) -> Correlation:
    """Both terms of C = A^T B / N for `a` and `b` `[m, d]` that belong to `rows`."""
    diagonal = rows.mean(a * b)
    squares = rows.squared_product(a, b) / rows.images**2
    return Correlation((diagonal - 1).square().sum(), squares - diagonal.square().sum())


def _check(name: str, z: Tensor, comm: Comm) -> None:
    if z.dim() != 3:
        raise ValueError(f"{name}: expected z of shape [K, N, d], got {list(z.shape)}")
    if z.shape[0] * comm.view_shards < 2:
        raise ValueError(f"{name}: needs 2 views or more, got 1")
    if z.shape[1] * comm.data_shards < 2:
        raise ValueError(f"{name}: the variance needs 2 images or more, got 1")
