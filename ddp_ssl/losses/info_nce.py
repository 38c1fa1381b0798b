"""InfoNCE over the global batch."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, check_temperature, gather_unit_rows, unit_rows
from ddp_ssl.losses.pairs import blocks, kept_blocks

# exp((cosine - 1) / temperature) >= exp(-2 / temperature) must not underflow.
LOWEST = {torch.float32: 1 / 40, torch.float64: 1 / 350}


def info_nce(
    z: Tensor, temperature: float, comm: Comm = ONE_PROCESS, gathered: Tensor | None = None
) -> Tensor:
    """NT-Xent, averaged over all pairs of views: SimCLR's loss at K = 2.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process), normalised within.
    `gathered`: `gather_unit_rows(z, ...)` in float32 or wider, if the caller has it already; no
    gradient flows into it. Returns a scalar in float32 or float64: the full loss on every process.

    For anchor (k, i) and each other view m: -s(k,i,m,i) + log of the sum of exp s over all 2N
    samples of views k and m but the anchor itself, with s = cosine / temperature. Source: SimCLR
    (Chen et al. 2020), Eq. 1; AdaDim Eq. 4; pairs of K > 2 views as CMC (Tian et al. 2020).

    Each process computes the rows of its own anchors, in blocks, so that memory is a few blocks and
    not N x N. Temperatures below 0.025 are computed in float64; the lowest is 1/350.
    """
    if z.dim() != 3:
        raise ValueError(f"info_nce: expected z of shape [K, N, d], got {list(z.shape)}")
    check_temperature("info_nce", temperature=temperature)
    if temperature < LOWEST[torch.float64]:
        raise ValueError(f"info_nce: temperature must be 1/350 or more, got {temperature}")
    with torch.autocast(z.device.type, enabled=False):
        given, z = z, at_least_float32(z)
        dtype = z.dtype if temperature >= LOWEST[z.dtype] else torch.float64
        u = unit_rows(z.to(dtype))
        everyone = gather_unit_rows(given, u, comm) if gathered is None else gathered.detach()
        if everyone.dtype != dtype:
            everyone = unit_rows(everyone.to(dtype))
        views, images, _ = everyone.shape
        if views < 2:
            raise ValueError(f"info_nce: needs 2 views or more, got {views}")
        if images < 2:
            warnings.warn("info_nce: one image has no negatives, so its loss is always 0")
        part = _InfoNCE.apply(u, everyone, 1 / temperature, comm)
        total = comm.sum(cast(Tensor, part)) / (views * images * (views - 1))
        return total.to(z.dtype)


class _InfoNCE(torch.autograd.Function):
    """Sum of the losses of the anchors held here, from unit rows `[k, n, d]` and `[K, N, d]`.

    With E = exp(s - 1 / temperature), 0 for an anchor itself, and B the sums of E over each view's
    images, the denominator of anchor (k, i) and view m is D = B_k + B_m, and the loss's derivative
    by s is the sum of E / D over the denominators that a pair stands in, less 1 for a positive
    one. s is symmetric, so that a row held here has its part in the others' losses too: E over
    *their* denominators, which are gathered. See `losses.pairs`.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, everyone: Tensor, sharpness: float, comm: Comm) -> Tensor:
        (k, n, _), (views, images, _) = u.shape, everyone.shape
        held = torch.arange(views, device=u.device)[comm.views].repeat_interleave(n)
        place = torch.arange(images, device=u.device)[comm.rows(n)].repeat(k)
        rows, columns = u.flatten(0, 1), everyone.flatten(0, 1)
        sums = u.new_empty(k * n, views)  # B
        parts = list(blocks(rows, views * images))
        kept: list[Tensor] = []
        for index, part in enumerate(parts):
            e = _exponentials(rows[part], columns, sharpness, held[part] * images + place[part])
            torch.sum(e.view(-1, views, images), 2, out=sums[part])
            if index < kept_blocks(rows, parts):
                kept.append(e)
        own = held[:, None]
        denominators = sums + sums.gather(1, own)
        # What E is divided by, for a column of each view: for another view its denominator, for
        # the anchor's own view, which stands in all denominators, one over the sum of 1 / D.
        inverse = denominators.reciprocal()
        others = inverse.scatter(1, own, 0.0)
        weight = others.scatter(1, own, others.sum(1, keepdim=True))  # [k n, K]
        positives = everyone[:, comm.rows(n)].sum(0) - u  # [k, n, d]
        agreement = (u * positives).sum()
        logs = denominators.log().scatter(1, own, 0.0).sum()
        all_weights = comm.gather(weight.view(k, n, views))  # [K, N, K]
        ctx.save_for_backward(rows, columns, weight, all_weights, positives, held, place, *kept)
        ctx.sharpness = sharpness
        # The logs are of E's sums, 1 / temperature less than those of exp s.
        return logs + sharpness * (k * n * (views - 1) - agreement)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, weight, all_weights, positives, held, place, *kept = ctx.saved_tensors
        images = all_weights.shape[1]
        grad = torch.empty_like(rows)
        for index, part in enumerate(blocks(rows, len(columns))):
            own, itself = held[part], held[part] * images + place[part]
            if index < len(kept):
                e = kept[index]
            else:
                e = _exponentials(rows[part], columns, ctx.sharpness, itself)
            theirs = all_weights.movedim(2, 0)[own]  # [rows, K, N]
            both = theirs.add_(weight[part, :, None]).view_as(e).mul_(e)
            torch.matmul(both, columns, out=grad[part])
        grad = grad.view_as(positives).sub_(positives, alpha=2)
        return grad.mul_(ctx.sharpness * grads[0]), None, None, None


def _exponentials(rows: Tensor, columns: Tensor, sharpness: float, itself: Tensor) -> Tensor:
    """exp((cosine - 1) / temperature) `[m, K N]`, 0 where a row meets itself."""
    e = (rows @ columns.T).sub_(1).mul_(sharpness).exp_()
    return e.scatter_(1, itself[:, None], 0.0)
