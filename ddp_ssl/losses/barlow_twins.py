"""Barlow Twins over the global batch, for two views and for many."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import (
    Route,
    Rows,
    all_views,
    at_least_float32,
    gather_rows,
    gathers,
    rows_of,
    unit_rows,
)
from ddp_ssl.losses.pairs import blocks, gram, in_cache, inner


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
        given, z = z, at_least_float32(z)
        images, width = z.shape[1] * comm.data_shards, z.shape[2]
        everyone = gather_rows(given, z, comm) if gathers(route, images, width) else None
        # The members of a view group hold the same images: each takes a part of them.
        own = all_views(z, comm)
        if comm.view_shards > 1:
            own = own[:, comm.view_rank :: comm.view_shards]
        sums = comm.sum(cast(Tensor, _Pairs.apply(own, everyone, images, eps, comm.sum)))
        diagonals = sums[:-1].view(-1, width) / images
        on = (diagonals - 1).square().sum(1).mean()
        squares = sums[-1] / (images**2 * len(diagonals))
        return Correlation(on, squares - diagonals.square().sum(1).mean())


class _Pairs(torch.autograd.Function):
    """This process's part of N C_jj of each pair of views, and of the sum over pairs of |N C|_F^2.

    From `z` `[K, m, d]`: all views of the images held here and nowhere else; `everyone`
    `[K, N, d]`: those of all images, or none for d x d matrices; `total`: the sum over processes.
    Returns `[P d + 1]`. Standardising belongs to it, so that no standardised copy is kept.

    With the Gram matrices G_k = A_k A_k^T, |A^T B|_F^2 is the sum of G_a * G_b, and its gradient
    by A_a 2 G_b A_a: K matrices serve all pairs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        everyone: Tensor | None,
        images: int,
        eps: float,
        total: Callable[[Tensor], Tensor],
    ) -> Tensor:
        views, _, width = z.shape
        mean = total(z.sum(1)) / images
        variance = z.new_zeros(views, width)
        for part in in_cache(z):
            variance += (z[:, part] - mean[:, None]).square_().sum(1)
        inverse = (total(variance) / images + eps).rsqrt()
        pairs = list(combinations(range(views), 2))
        sums = z.new_zeros(len(pairs) * width + 1)
        diagonals = sums[:-1].view(len(pairs), width)
        kept: list[Tensor] = []
        if everyone is None:
            unit = _standard(z, mean, inverse)
            for row, (a, b) in zip(diagonals, pairs, strict=True):
                own = unit[a].T @ unit[b]
                row.copy_(own.diagonal())
                kept.append(total(own))
                sums[-1] += inner(own, kept[-1])
        else:
            parts = list(blocks(z[0], images))
            for part in parts:
                grams = _grams(z, everyone, part, mean, inverse)
                before = grams[0]
                for i, other in enumerate(grams[1:], 2):
                    sums[-1] += inner(before, other)
                    if i < views:
                        before = before + other
                kept = grams if len(parts) == 1 else []
            for part in in_cache(z):
                unit = _standard(z[:, part], mean, inverse)
                for row, (a, b) in zip(diagonals, pairs, strict=True):
                    row += (unit[a] * unit[b]).sum(0)
        ctx.save_for_backward(z, everyone, mean, inverse, *kept)
        ctx.images, ctx.total, ctx.pairs = images, total, pairs
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, everyone, mean, inverse, *kept = ctx.saved_tensors
        views, _, width = z.shape
        by_diagonal, by_square = grads[0][:-1].view(-1, width), 2 * grads[0][-1]
        grad = torch.zeros_like(z) if everyone is None else torch.empty_like(z)
        if everyone is None:
            unit = _standard(z, mean, inverse)
            for (a, b), products in zip(ctx.pairs, kept, strict=True):
                grad[a].addmm_(unit[b], products.T)
                grad[b].addmm_(unit[a], products)
            del unit
        else:
            for part in blocks(z[0], ctx.images):
                grams = kept or _grams(z, everyone, part, mean, inverse)
                every = sum(grams[1:], grams[0]) if views > 2 else None
                for v in range(views):
                    others = grams[1 - v] if every is None else every - grams[v]
                    columns = _standard(everyone[v], mean[v], inverse[v])
                    torch.matmul(others, columns, out=grad[v][part])
                    del columns
        # `grad` is now by the standardised features. Of it standardising leaves what is orthogonal
        # to a constant and to the features themselves. They add up to zero, and so does `grad`, up
        # to rounding, which counts where a mean is large beside its deviation.
        moments = grad.new_zeros(3, views, width)
        for part in in_cache(z):
            unit, out = _standard(z[:, part], mean, inverse), grad[:, part]
            out *= by_square
            for (a, b), weight in zip(ctx.pairs, by_diagonal, strict=True):
                out[a].addcmul_(unit[b], weight)
                out[b].addcmul_(unit[a], weight)
            moments += torch.stack([out.sum(1), unit.sum(1), (out * unit).sum(1)])
        constant, offset, along = ctx.total(moments) / ctx.images
        shift = constant - along * offset
        for part in in_cache(z):
            unit, out = _standard(z[:, part], mean, inverse), grad[:, part]
            out.addcmul_(unit, along[:, None], value=-1)
            out.sub_(shift[:, None]).mul_(inverse[:, None])
        return grad, None, None, None, None


def _standard(z: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Standardised `z` `[..., n, d]`, from mean and inverse deviation `[..., d]`."""
    return (z - mean.unsqueeze(-2)).mul_(inverse.unsqueeze(-2))


def _grams(z: Tensor, everyone: Tensor, part: slice, mean: Tensor, inverse: Tensor) -> list[Tensor]:
    """Of each view, the products of these rows with everyone's."""
    found = []
    for own, rows, m, i in zip(z, everyone, mean, inverse, strict=True):
        columns = _standard(rows, m, i)
        whole = len(own) == len(rows) == len(own[part])  # one process, one block
        found.append(gram(columns if whole else _standard(own[part], m, i), columns))
        del columns
    return found


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
