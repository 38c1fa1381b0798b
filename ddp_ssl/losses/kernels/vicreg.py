"""VICReg's three terms and their gradient, from sums over the images of each view."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import Comm
from ddp_ssl.losses.common import Route, at_least_float32, gather_rows, gathers
from ddp_ssl.losses.kernels.gram import add_up, blocks, gram, in_cache, inner


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

    @property
    def by_second(self) -> float:
        """The gradient of the weighted c by X_k is this times X_k (X_k^T X_k - diag q_k)."""
        return 4 * self.weights[2] * self.factors[2]


def terms(z: Tensor, formula: Formula, route: Route, comm: Comm) -> tuple[Tensor, ...]:
    """The weighted sum of s, v and c, and the three without gradient, from `z` `[k, n, d]` here."""
    found = _Terms.apply(at_least_float32(z), z.detach(), formula, route, comm)
    return cast(tuple[Tensor, ...], found)


class _Terms(torch.autograd.Function):
    """Forward already computes the columns' factors in the gradient, which all processes share.

    The means are constants in backward. The sums are stationary in them, since centred rows add up
    to zero.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, given: Tensor, formula: Formula, route: Route, comm: Comm
    ) -> tuple[Tensor, ...]:
        width, f, images, views = z.shape[2], formula, formula.images, formula.views
        mean = comm.sum(comm.placed(z.sum(1)))[comm.views, None] / images
        mean_view = None
        if comm.view_shards > 1:
            first = comm.view_sum(z.sum(0)) / views
            mean_view = torch.stack([first, comm.view_sum((z - first).sum(0)) / views])
        totals, seconds = list[Tensor](), list[Tensor]()
        for part in in_cache(z):
            squares = (z[:, part] - mean).square_().sum(1)
            add_up(totals, squares, _from_mean_view(z, mean_view, part).square_().sum())
        squares, distance = totals
        rows, whole, kept = None, None, list[Tensor]()
        if gathers(route, images, width):
            if comm.world_size > 1:  # centred rows of all images, and so those held here
                rows = gather_rows(given, z, comm)[comm.views].contiguous().sub_(mean)
            for v in range(len(z)):
                own, every = _centred(v, z, mean, rows, comm)
                parts = list(blocks(own, images))
                for part in parts:
                    products = gram(own[part], every)
                    seconds.append(products.square().sum())
                kept += [products] if len(parts) == 1 else []
        else:
            moments = z.new_empty(len(z), width, width)
            for moment, own, centre in zip(moments, z, mean, strict=True):
                columns = (own - centre).T
                moment.copy_(gram(columns, columns))
            whole = comm.sum(comm.placed(moments))[comm.views]
            seconds.append(inner(moments.flatten(0, 1), whole.flatten(0, 1)))
        q = comm.placed(squares).flatten()
        sums = comm.sum(torch.hstack([q, *seconds, distance]))
        q, second = sums[: len(q)], sums[len(q) : -1].sum()

        found, factors = _evaluated(f, q, second, sums[-1])
        factors = factors.view(views, 1, width)[comm.views]
        ctx.save_for_backward(z, mean_view, mean, rows, factors, whole, *kept)
        ctx.formula, ctx.comm = f, comm
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 5
        z, mean_view, mean, rows, factors, whole, *kept = ctx.saved_tensors
        comm, f, grad = ctx.comm, ctx.formula, torch.empty_like(z)
        for v, out in enumerate(grad):
            own, every = _centred(v, z, mean, rows, comm)
            torch.mul(own, factors[v], out=out)
            if whole is not None:
                out.addmm_(own, whole[v], alpha=f.by_second)
            for part in blocks(own, f.images) if whole is None else ():
                products = kept[v] if kept else own[part] @ every.T
                out[part].addmm_(products, every, alpha=f.by_second)
            del own, every
        # The gradients of variance and covariance add up to zero over images, but for a rounding
        # error that counts where a mean is large beside its deviation.
        sums = comm.sum(torch.hstack([comm.placed(grad.sum(1)).flatten(), grads[0]]))
        offset, scale = sums[:-1].view(f.views, 1, -1)[comm.views], sums[-1]
        for part in in_cache(z):
            apart = _from_mean_view(z, mean_view, part)
            out = grad[:, part].sub_(offset, alpha=1 / f.images)
            out.add_(apart, alpha=2 * f.weights[0] * f.factors[0]).mul_(scale)
        return grad, None, None, None, None


def _evaluated(
    f: Formula, q: Tensor, second: Tensor, distance: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The weighted sum of s, v and c, and the three; factors `[K d]` of the columns of all X_k.

    The gradient of the weighted v and c by X_k is X_k times (the diagonal matrix of its factors +
    `by_second` X_k^T X_k). `q`: `[K d]`. `second`: the sum of all |X_k^T X_k|_F^2. `distance`: that
    of all |Z_k - mean Z|^2.
    """
    root = math.sqrt(f.images - 1)  # times which deviations and hinge are
    deviations = (q + f.eps * (f.images - 1)).sqrt_()
    hinge = (f.gamma * root - deviations).clamp_(min=0)
    by_v = f.factors[1] / root
    sums = [distance, hinge.sum(), second - q.square().sum()]
    s, v, c = torch._foreach_mul(sums, [f.factors[0], by_v, f.factors[2]])
    loss = (f.weights[0] * s).add_(v, alpha=f.weights[1]).add_(c, alpha=f.weights[2])
    factors = (q * -f.by_second).addcdiv_(hinge.sign_(), deviations, value=-f.weights[1] * by_v)
    return (loss, s, v, c), factors


def _centred(
    view: int, z: Tensor, mean: Tensor, rows: Tensor | None, comm: Comm
) -> tuple[Tensor, Tensor]:
    """A view's centred rows of the images held here and of all images; `rows` has them, if any."""
    if rows is None:
        own = z[view] - mean[view]
        return own, own
    return rows[view, comm.rows(z.shape[1])], rows[view]


def _from_mean_view(z: Tensor, mean_view: Tensor | None, part: slice) -> Tensor:
    """Some rows of all views `[k, m, d]` less their mean over views.

    `mean_view`: that mean in two parts `[2, n, d]`, or none if all views are here. The mean of the
    rounding error is subtracted as well: views are alike, so the difference is small.
    """
    own = z[:, part]
    apart = own - (own.mean(0) if mean_view is None else mean_view[0, part])
    return apart.sub_(apart.mean(0) if mean_view is None else mean_view[1, part])
