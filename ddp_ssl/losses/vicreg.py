"""VICReg over the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import Route, at_least_float32, gather_rows, gathers, rows_of
from ddp_ssl.losses.pairs import gram, gram_square, gram_times, in_cache, inner


class VICReg(NamedTuple):
    """The weighted loss and its unweighted terms."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg(
    z: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    *,
    gamma: float = 1.0,
    eps: float = 1e-4,
    average_variance: bool = False,
    route: Route = "auto",
    comm: Comm = ONE_PROCESS,
) -> VICReg:
    """VICReg for K >= 2 views; at K = 2 the published loss.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns scalars in float32
    or float64, the full values on every process.

    invariance  2K/(K-1) * 1/(K N d) sum_k |Z_k - mean Z|^2, the mean over pairs at O(K)
    variance    2/K sum_k of 1/d sum_j max(0, gamma - sqrt(Var z_kj + eps)); 1/K with
                `average_variance`, as the official code
    covariance  2/K sum_k of 1/d sum of the squared off-diagonal covariances

    `route`: see `losses.common.gathers`. Source: VICReg (Bardes et al. 2022),
    Eq. 1 to 6, with solo-learn's divisors. Raises `ValueError` for one view or one image.
    """
    if z.dim() != 3:
        raise ValueError(f"vicreg: expected z of shape [K, N, d], got {list(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        given, z = z, at_least_float32(z)
        k, n, width = z.shape
        views, images = k * comm.view_shards, n * comm.data_shards
        if views < 2:
            raise ValueError(f"vicreg: needs 2 views or more, got {views}")
        if images < 2:
            raise ValueError("vicreg: the variance needs 2 images or more, got 1")

        def total(x: Tensor) -> Tensor:
            """Sums over all images `[K, ...]`, of every view, from those held here `[k, ...]`."""
            if comm.view_shards == 1:
                return comm.sum(x)
            sums = x.new_zeros(views, *x.shape[1:])
            sums[comm.views] = x
            return comm.sum(sums)

        with torch.no_grad():
            mean_view = None
            if comm.view_shards > 1:
                first = comm.view_sum(z.sum(0)) / views
                mean_view = torch.stack([first, comm.view_sum((z - first).sum(0)) / views])
            mean = total(z.sum(1))[comm.views] / images
            everyone = None
            if gathers(route, images, width):
                everyone = gather_rows(given, z, comm)[comm.views].contiguous()
        parts = _Sums.apply(z, mean_view, mean, everyone, images, lambda x: total(x)[comm.views])
        sums = total(parts)
        var, squares = sums[:, :-2] / (images - 1), sums[:, -2] / (images - 1) ** 2
        spread = sums[:, -1].sum() / (views * images * width)

        s = 2 * views / (views - 1) * spread
        hinge = (gamma - (var + eps).sqrt()).clamp(min=0).mean(1)
        off_diagonal = (squares - var.square().sum(1)) / width
        v = hinge.mean() * (1 if average_variance else 2)
        c = off_diagonal.mean() * 2
        return VICReg(invariance * s + variance * v + covariance * c, s, v, c)


class _Sums(torch.autograd.Function):
    """Per view held here `[k, d + 2]`: squares of each centred feature, this process's part of the
    squared norm of the second moment, and the squared distance from the views' mean.

    From `z` `[k, n, d]`, the mean over views in two parts `[2, n, d]` (none: all views are here)
    and over images `[k, d]`, and either the rows of all `images` `[k, N, d]` or none; `total` sums
    `[k, ...]` over processes. The means are constants here: all three are stationary in them, since
    centred rows add up to zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mean_view: Tensor | None,
        mean: Tensor,
        everyone: Tensor | None,
        images: int,
        total: Callable[[Tensor], Tensor],
    ) -> Tensor:
        k, n, width = z.shape
        sums = z.new_zeros(k, width + 2)
        for part in in_cache(z):
            sums[:, :width] += (z[:, part] - mean[:, None]).square_().sum(1)
            sums[:, -1] += _from_mean_view(z, mean_view, part).square_().sum((1, 2))
        kept: list[Tensor | None] = []
        whole = None
        if everyone is None:
            moments = z.new_empty(k, width, width)
            for moment, own, centre in zip(moments, z, mean, strict=True):
                columns = (own - centre).T
                moment.copy_(gram(columns, columns))
            whole = total(moments)
            sums[:, width] = torch.stack([inner(a, b) for a, b in zip(moments, whole, strict=True)])
        else:
            for view, own, every, centre in zip(sums, z, everyone, mean, strict=True):
                centred = own - centre
                # In one process, or one view group, both are the same rows.
                rows = centred if len(every) == n else every - centre
                view[width], products = gram_square(centred, rows)
                kept.append(products)
        ctx.save_for_backward(z, mean_view, mean, everyone, whole, *kept)
        ctx.total, ctx.images = total, images
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, mean_view, mean, everyone, whole, *kept = ctx.saved_tensors
        grad = torch.empty_like(z)
        width = z.shape[2]
        for v, (out, scale) in enumerate(zip(grad, grads[0], strict=True)):
            centred = z[v] - mean[v]
            torch.mul(centred, 2 * scale[:width], out=out)
            if whole is not None:
                out.addmm_(centred, whole[v] * (4 * scale[width]))
            else:
                rows = centred if everyone.shape[1] == z.shape[1] else everyone[v] - mean[v]
                gram_times(centred, rows, rows, kept[v], out, 4 * scale[width])
                del rows
            del centred
        # What comes of variance and covariance adds up to zero, up to rounding, which counts where
        # a mean is large beside its deviation.
        offset = ctx.total(grad.sum(1)) / ctx.images
        weight = 2 * grads[0][:, -1, None, None]
        for part in in_cache(z):
            apart = _from_mean_view(z, mean_view, part)
            grad[:, part] += apart.mul_(weight).sub_(offset[:, None])
        return grad, None, None, None, None, None


def _from_mean_view(z: Tensor, mean_view: Tensor | None, part: slice) -> Tensor:
    """Some rows of all views `[k, m, d]` less their mean over views.

    Of it what rounding left is taken off too: views are alike, so that little may be lost.
    """
    own = z[:, part]
    first = own.mean(0) if mean_view is None else mean_view[0, part]
    apart = own - first
    return apart.sub_(apart.mean(0) if mean_view is None else mean_view[1, part])


def vicreg_multiview(
    z: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    *,
    gamma: float = 1.0,
    eps: float = 1e-12,
    route: Route = "auto",
    comm: Comm = ONE_PROCESS,
) -> VICReg:
    """VICReg of K views against the mean of the others, in O(K), as fastssl defines it.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns scalars in float32
    or float64, the full values on every process. With O_k the mean of the views other than k:

    invariance  mean over k of the mean squared element of Z_k - O_k
    variance    mean over k of v(Z_k)/2 + v(O_k)/2, v = 1/d sum_j max(0, gamma - sqrt(Var_j + eps))
    covariance  mean over k of c(Z_k) + c(O_k), c = 1/d sum of the squared off-diagonal covariances

    `route`: see `losses.common.gathers`. Source: Ghosh et al. 2023 (small projectors and multiple
    views), fastssl, which has no `eps` (a constant feature's gradient is then NaN). Raises
    `ValueError` for one view or one image.
    """
    if z.dim() != 3:
        raise ValueError(f"vicreg_multiview: expected z of shape [K, N, d], got {list(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        rows = rows_of(at_least_float32(z), route, comm)
        own, images = rows.values, rows.images
        views, _, width = own.shape
        if views < 2:
            raise ValueError(f"vicreg_multiview: needs 2 views or more, got {views}")
        if images < 2:
            raise ValueError("vicreg_multiview: the variance needs 2 images or more, got 1")
        others = (own.sum(0) - own) / (views - 1)
        s = rows.total((own - others).square().sum()) / (views * images * width)
        # Of two views, the others are the views themselves, exchanged.
        every = torch.cat([own, others]) if views > 2 else own
        centred = every - rows.total(every.sum(1))[:, None] / images
        squares = torch.stack([rows.squared_product(x, x) for x in centred]) / (images - 1) ** 2
        var = rows.total(centred.square().sum(1)) / (images - 1)
        v = (gamma - (var + eps).sqrt()).clamp(min=0).mean()
        c = 2 * ((squares - var.square().sum(1)) / width).mean()
        return VICReg(invariance * s + variance * v + covariance * c, s, v, c)
