"""InfoNCE's log-sums over all pairs of samples, in blocks."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import Comm
from ddp_ssl.losses.kernels.gram import blocks, kept_blocks
from ddp_ssl.losses.kernels.unit_rows import Compared, UnitRows


def anchor_losses(rows: Compared, temperature: float, comm: Comm) -> Tensor:
    """Sum over the anchors held here, and over the other views m, of InfoNCE's loss; a scalar.

    The gradient by `rows.unit` is that of the sum over all processes.
    """
    return cast(Tensor, _InfoNCE.apply(rows.unit, rows, 1 / temperature, comm))


class _InfoNCE(torch.autograd.Function):
    """`anchor_losses` with its gradient.

    Let E = exp(s - 1 / temperature), 0 for an anchor itself, and B the sums of E over each view's
    images. The denominator of anchor (k, i) and view m is D = B_k + B_m. The loss's derivative by s
    is the sum of E / D over the denominators that hold s, less 1 for a positive pair. s is
    symmetric, so a row held here stands in the others' losses too: with E over *their*
    denominators, which are gathered. See `kernels.gram`.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, given: Compared, sharpness: float, comm: Comm) -> Tensor:
        (k, n, _), (views, images, _) = u.shape, given.everyone.values.shape
        held = torch.arange(views, device=u.device)[comm.views].repeat_interleave(n)
        place = torch.arange(images, device=u.device)[comm.rows(n)].repeat(k)
        rows, columns = given.own.flat(), given.everyone.flat()
        sums = u.new_empty(k * n, views)  # B
        parts = list(blocks(rows.values, views * images))
        kept: list[Tensor] = []
        for index, part in enumerate(parts):
            itself = held[part] * images + place[part]
            e = _exponentials(rows.at(part), columns, sharpness, itself)
            torch.sum(e.view(-1, views, images), 2, out=sums[part])
            if index < kept_blocks(u, parts):
                kept.append(e)
        own = held[:, None]
        denominators = sums + sums.gather(1, own)
        # The factor of E for a column of each view: 1 / D for another view; the sum of 1 / D for
        # the anchor's own view, which stands in all denominators.
        inverse = denominators.reciprocal()
        others = inverse.scatter(1, own, 0.0)
        weight = others.scatter(1, own, others.sum(1, keepdim=True))  # [k n, K]
        positives = given.everyone.at((slice(None), comm.rows(n))).unit().sum(0) - u  # [k, n, d]
        agreement = (u * positives).sum()
        logs = denominators.log().scatter(1, own, 0.0).sum()
        all_weights = comm.gather(weight.view(k, n, views))  # [K, N, K]
        both = rows.values, rows.scale, columns.values, columns.scale
        ctx.save_for_backward(*both, weight, all_weights, positives, held, place, *kept)
        ctx.sharpness = sharpness
        # A log of a sum of E is 1 / temperature less than that of the sum of exp s.
        return logs + sharpness * (k * n * (views - 1) - agreement)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = UnitRows(*ctx.saved_tensors[:2]), UnitRows(*ctx.saved_tensors[2:4])
        weight, all_weights, positives, held, place, *kept = ctx.saved_tensors[4:]
        images = all_weights.shape[1]
        grad = positives.new_empty(rows.values.shape)
        for index, part in enumerate(blocks(rows.values, len(columns.values))):
            own, itself = held[part], held[part] * images + place[part]
            if index < len(kept):
                e = kept[index]
            else:
                e = _exponentials(rows.at(part), columns, ctx.sharpness, itself)
            theirs = all_weights.movedim(2, 0)[own]  # [rows, K, N]
            both = theirs.add_(weight[part, :, None]).view_as(e).mul_(e)
            columns.combine(both, out=grad[part])
        grad = grad.view_as(positives).sub_(positives, alpha=2)
        return grad.mul_(ctx.sharpness * grads[0]), None, None, None


def _exponentials(rows: UnitRows, columns: UnitRows, sharpness: float, itself: Tensor) -> Tensor:
    """exp((cosine - 1) / temperature) `[m, K N]`, 0 where a row meets itself."""
    e = rows.cosines(columns).sub_(1).mul_(sharpness).exp_()
    return e.scatter_(1, itself[:, None], 0.0)
