"""VICReg's three terms and their gradient, from sums over the images of each view."""

import math
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import Comm
from ddp_ssl.losses.common import Route, at_least_float32, gather_rows, gathers
from ddp_ssl.losses.kernels.gram import blocks, gram, in_cache, inner


class Formula(NamedTuple):
    """The numbers of VICReg's formula; `weights` and `factors` are those of s, v and c.

    With X_k the centred rows of view k and q_kj the squares of its feature j, summed over `images`:

        s = factor * sum_k |Z_k - mean Z|^2
        v = factor * sum_kj max(0, gamma - sqrt(q_kj / (images - 1) + eps))
        c = factor * sum_k (|X_k^T X_k|_F^2 - sum_j q_kj^2)
    """

    weights: tuple[float, float, float]
    factors: tuple[float, float, float]
    gamma: float
    eps: float
    views: int
    images: int


def terms(z: Tensor, formula: Formula, route: Route, comm: Comm) -> tuple[Tensor, ...]:
    """The weighted sum of s, v and c, and the three without gradient, from `z` `[k, n, d]` here."""
    found = _Terms.apply(at_least_float32(z), z.detach(), formula, route, comm)
    return cast(tuple[Tensor, ...], found)


class _Terms(torch.autograd.Function):
    """Forward already computes the gradient by q, which is the same on all processes.

    The means are constants in backward. The sums are stationary in them, since centred rows add up
    to zero.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, given: Tensor, formula: Formula, route: Route, comm: Comm
    ) -> tuple[Tensor, ...]:
        _, n, width = z.shape
        f, images, views = formula, formula.images, formula.views
        mean = _total(z.sum(1), views, comm)[comm.views, None] / images
        whole, kept, seconds = None, list[Tensor](), list[Tensor]()
        if gathers(route, images, width):
            rows = gather_rows(given, z, comm)[comm.views]  # in one process z itself
            rows = rows - mean if comm.world_size == 1 else rows.sub_(mean)
            centred = rows[:, comm.rows(n)]
            for own, every in zip(centred, rows, strict=True):
                parts = list(blocks(own, images))
                for part in parts:
                    products = gram(own[part], every)
                    seconds.append(products.square().sum())
                kept += [products] if len(parts) == 1 else []
        else:
            rows = centred = z - mean
            moments = z.new_empty(len(z), width, width)
            for moment, own in zip(moments, centred, strict=True):
                moment.copy_(gram(own.T, own.T))
            whole = _total(moments, views, comm)[comm.views]
            seconds.append(inner(moments.flatten(0, 1), whole.flatten(0, 1)))
        apart = _from_mean_view(z, views, comm)
        squares = reduce(torch.add, [centred[:, i].square().sum(1) for i in in_cache(z)])
        distance = reduce(torch.add, [apart[:, i].square().sum() for i in in_cache(z)])
        squares = _placed(squares, views, comm).flatten()
        sums = comm.sum(torch.hstack([squares, *seconds, distance]))
        squares, second = sums[: len(squares)], sums[len(squares) : -1].sum()

        # The deviations times the root of images - 1, and so is the hinge.
        root = math.sqrt(images - 1)
        deviations = (squares + f.eps * (images - 1)).sqrt_()
        hinge = (f.gamma * root - deviations).clamp_(min=0)
        found = [sums[-1], hinge.sum(), second - squares.square().sum()]
        of_v = f.factors[1] / root
        s, v, c = torch._foreach_mul(found, [f.factors[0], of_v, f.factors[2]])
        loss = (f.weights[0] * s).add_(v, alpha=f.weights[1]).add_(c, alpha=f.weights[2])

        # The gradient by a centred row is this times the row, and more.
        by_second, by_hinge = 4 * f.weights[2] * f.factors[2], f.weights[1] * of_v
        slopes = (squares * -by_second).addcdiv_(hinge.sign_(), deviations, value=-by_hinge)
        ctx.save_for_backward(rows, apart, slopes.view(views, 1, width), whole, *kept)
        ctx.by_second, ctx.formula, ctx.comm = by_second, f, comm
        ctx.mark_non_differentiable(s, v, c)
        ctx.set_materialize_grads(False)
        return loss, s, v, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 5
        rows, apart, slopes, whole, *kept = ctx.saved_tensors
        comm, f = ctx.comm, ctx.formula
        scale = comm.sum(grads[0])
        centred = rows if whole is not None else rows[:, comm.rows(apart.shape[1])]
        grad = centred * slopes[comm.views]
        for v, (out, own) in enumerate(zip(grad, centred, strict=True)):
            if whole is not None:
                out.addmm_(own, whole[v], alpha=ctx.by_second)
                continue
            for part in blocks(own, f.images):
                products = kept[v] if kept else own[part] @ rows[v].T
                out[part].addmm_(products, rows[v], alpha=ctx.by_second)
        # The gradients of variance and covariance add up to zero over images, but for a rounding
        # error that counts where a mean is large beside its deviation.
        offset = _total(grad.sum(1), f.views, comm)[comm.views, None]
        for part in in_cache(grad):
            out = grad[:, part].sub_(offset, alpha=1 / f.images)
            out.add_(apart[:, part], alpha=2 * f.weights[0] * f.factors[0]).mul_(scale)
        return grad, None, None, None, None


def _placed(x: Tensor, views: int, comm: Comm) -> Tensor:
    """Rows `[k, ...]` of the views held here among those of all views `[K, ...]`, else zero."""
    if comm.view_shards == 1:
        return x
    whole = x.new_zeros(views, *x.shape[1:])
    whole[comm.views] = x
    return whole


def _total(x: Tensor, views: int, comm: Comm) -> Tensor:
    """Sums over all images `[K, ...]`, of every view, from those held here `[k, ...]`."""
    return comm.sum(_placed(x, views, comm))


def _from_mean_view(z: Tensor, views: int, comm: Comm) -> Tensor:
    """`z` `[k, n, d]` less the mean over all views.

    The mean of the rounding error is subtracted as well: views are alike, so the difference is
    small.
    """

    def mean(x: Tensor) -> Tensor:
        return x.mean(0) if comm.view_shards == 1 else comm.view_sum(x.sum(0)) / views

    apart = z - mean(z)
    return apart.sub_(mean(apart))
