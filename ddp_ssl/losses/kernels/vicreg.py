"""Sums over images of each view: spread from the mean view, variances, squared covariances."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import Comm
from ddp_ssl.losses.common import Route, at_least_float32, gather_rows, gathers
from ddp_ssl.losses.kernels.gram import gram, gram_square, gram_times, in_cache, inner


def view_sums(
    z: Tensor, views: int, images: int, route: Route, comm: Comm
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all `images`, of all `views`, from `z` `[k, n, d]` held here.

    With X_k the centred rows of view k: the squares of each feature `[K, d]`, |X_k^T X_k|_F^2
    `[K]`, and the squared distance of each view from the mean over views `[K]`.
    """
    given, z = z, at_least_float32(z)

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
        if gathers(route, images, z.shape[2]):
            everyone = gather_rows(given, z, comm)[comm.views].contiguous()
    parts = _Sums.apply(z, mean_view, mean, everyone, images, lambda x: total(x)[comm.views])
    sums = total(cast(Tensor, parts))
    return sums[:, :-2], sums[:, -2], sums[:, -1]


class _Sums(torch.autograd.Function):
    """This process's part of `view_sums` for the views held here, `[k, d + 2]`.

    `z`: `[k, n, d]`. `mean_view`: the mean over views in two parts `[2, n, d]`, or none if all
    views are here. `mean`: the mean over images `[k, d]`. `everyone`: the rows of all images
    `[k, N, d]`, or none for d x d moments. `total`: sums `[k, ...]` over processes.

    The means are constants here. The sums are stationary in them, since centred rows add up to
    zero.
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
        # The gradients of variance and covariance add up to zero over images, but for a rounding
        # error that counts where a mean is large beside its deviation.
        offset = ctx.total(grad.sum(1)) / ctx.images
        weight = 2 * grads[0][:, -1, None, None]
        for part in in_cache(z):
            apart = _from_mean_view(z, mean_view, part)
            grad[:, part] += apart.mul_(weight).sub_(offset[:, None])
        return grad, None, None, None, None, None


def _from_mean_view(z: Tensor, mean_view: Tensor | None, part: slice) -> Tensor:
    """Some rows of all views `[k, m, d]` less their mean over views.

    The mean of the rounding error is subtracted as well: views are alike, so the difference is
    small.
    """
    own = z[:, part]
    first = own.mean(0) if mean_view is None else mean_view[0, part]
    apart = own - first
    return apart.sub_(apart.mean(0) if mean_view is None else mean_view[1, part])
