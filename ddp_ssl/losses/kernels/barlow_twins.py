"""Sums over images of the products of two views' standardised features, for all pairs of views."""

from collections.abc import Callable
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import Comm
from ddp_ssl.losses.common import Route, all_views, at_least_float32, gather_rows, gathers
from ddp_ssl.losses.kernels.gram import blocks, gram, in_cache, inner


def pair_sums(
    z: Tensor, images: int, route: Route, eps: float, comm: Comm
) -> tuple[Tensor, Tensor]:
    """N C_jj of each pair of views `[P, d]`, and the sum over pairs of |N C|_F^2, a scalar.

    C = A^T B / N for two views A and B, each feature standardised over all `images` (biased
    variance, `eps` under the root). `z`: embeddings `[k, n, d]` held here.
    """
    given, z = z, at_least_float32(z)
    everyone = gather_rows(given, z, comm) if gathers(route, images, z.shape[2]) else None
    # The members of a view group hold the same images: each takes a part of them.
    own = all_views(z, comm)
    if comm.view_shards > 1:
        own = own[:, comm.view_rank :: comm.view_shards]
    sums = comm.sum(cast(Tensor, _Pairs.apply(own, everyone, images, eps, comm.sum)))
    return sums[:-1].view(-1, z.shape[2]), sums[-1]


class _Pairs(torch.autograd.Function):
    """This process's part of `pair_sums`, `[P d + 1]`.

    `z`: `[K, m, d]`, all views of images that no other process passes. `everyone`: `[K, N, d]`,
    those of all images, or none for d x d matrices. `total`: the sum over processes. The features
    are standardised in here, so that no standardised copy is kept.

    With the Gram matrices G_k = A_k A_k^T, |A_a^T A_b|_F^2 is the sum of the elements of G_a * G_b,
    and its gradient by A_a is 2 G_b A_a. So K matrices serve all pairs.
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
        # `grad` is now the gradient by the standardised features. Standardising projects it onto
        # what is orthogonal to a constant and to the features. The features add up to zero, and so
        # does `grad`, but for a rounding error that counts where a mean is large beside its
        # deviation.
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
    """For each view, the products of the rows in `part` with everyone's, `[m, N]`."""
    found = []
    for own, rows, m, i in zip(z, everyone, mean, inverse, strict=True):
        columns = _standard(rows, m, i)
        whole = len(own) == len(rows) == len(own[part])  # one process, one block
        found.append(gram(columns if whole else _standard(own[part], m, i), columns))
        del columns
    return found
