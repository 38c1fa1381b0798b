"""Cross-correlations of two views' standardised features, summed up for all pairs of views."""

from collections.abc import Iterator
from functools import reduce
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import Comm
from ddp_ssl.losses.common import Route, all_views, at_least_float32, gather_rows, gathers
from ddp_ssl.losses.kernels.gram import add_up, blocks, gram, in_cache, inner


def pair_terms(
    z: Tensor, images: int, route: Route, eps: float, comm: Comm
) -> tuple[Tensor, Tensor]:
    """The means over pairs of views of sum_j (C_jj - 1)^2 and of sum_{j != l} C_jl^2.

    C = A^T B / N for two views A and B, each feature standardised over all `images` (biased
    variance, `eps` under the root). `z`: embeddings `[k, n, d]` held here.
    """
    given, z = z, at_least_float32(z)
    everyone = gather_rows(given, z, comm) if gathers(route, images, z.shape[2]) else None
    # The members of a view group hold the same images: each takes a part of them.
    own = all_views(z, comm)
    if comm.view_shards > 1:
        own = own[:, comm.view_rank :: comm.view_shards]
    return cast(tuple[Tensor, Tensor], _Pairs.apply(own, everyone, images, eps, comm))


class _Pairs(torch.autograd.Function):
    """`pair_terms` of `z` `[K, m, d]`, all views of images that no other process passes.

    `everyone`: `[K, N, d]`, those of all images, or none for d x d matrices. In one process it is
    `z`, and the features are standardised whenever they are needed, so that no standardised copy
    is kept. Else `everyone` is standardised in place.

    With the Gram matrices G_k = A_k A_k^T, |A_a^T A_b|_F^2 is the sum of the elements of G_a * G_b,
    and its gradient by A_a is 2 G_b A_a. So K matrices serve all pairs.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, everyone: Tensor | None, images: int, eps: float, comm: Comm
    ) -> tuple[Tensor, Tensor]:
        views, pairs = len(z), list(combinations(range(len(z)), 2))
        mean = comm.sum(z.sum(1)) / images
        cached = _or_empty(in_cache(z))
        squares = list[Tensor]()
        for part in cached:
            add_up(squares, (z[:, part] - mean[:, None]).square_().sum(1))
        inverse = (comm.sum(squares[0]) / images + eps).rsqrt()
        unit = _Unit(z, mean, inverse, None, comm)
        if everyone is not None and comm.world_size > 1:
            everyone.sub_(mean[:, None]).mul_(inverse[:, None])
            unit = _Unit(z, mean, inverse, everyone, comm)
        kept, sums = list[Tensor](), list[Tensor]()
        if everyone is None:
            rows = unit.own(slice(None))
            diagonals = list[Tensor]()
            for a, b in pairs:
                own = rows[a].T @ rows[b]
                kept.append(comm.sum(own))
                sums.append(inner(own, kept[-1]))
                diagonals.append(own.diagonal().clone())
            diagonal = torch.stack(diagonals)
        else:
            parts = _or_empty(blocks(z[0], images))
            for part in parts:
                grams = unit.grams(part)
                before = grams[0]
                for i, other in enumerate(grams[1:], 2):
                    sums.append((before * other).sum())
                    if i < views:
                        before = before + other
                kept = grams if len(parts) == 1 else []
            diagonals = []
            for part in cached:
                rows = unit.own(part)
                add_up(diagonals, torch.stack([(rows[a] * rows[b]).sum(0) for a, b in pairs]))
            (diagonal,) = diagonals
        found = comm.sum(torch.hstack([diagonal.flatten(), reduce(torch.add, sums)]))
        diagonal = found[:-1].view_as(diagonal) / images
        total = [(diagonal - 1).square().sum(), diagonal.square().sum(), found[-1] / images**2]
        on, on_squared, squared = torch._foreach_div(total, len(pairs))
        ctx.save_for_backward(z, mean, inverse, unit.rows, diagonal, *kept)
        ctx.images, ctx.comm, ctx.pairs, ctx.moments = images, comm, pairs, everyone is None
        return on, squared - on_squared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, inverse, rows, diagonal, *kept = ctx.saved_tensors
        unit, views, images = _Unit(z, mean, inverse, rows, ctx.comm), len(z), ctx.images
        by_on, by_off = ctx.comm.sum(torch.stack(grads)) * (2 / (len(ctx.pairs) * images))
        by_diagonal = diagonal * (by_on - by_off) - by_on
        by_square = by_off / images
        grad = torch.zeros_like(z) if ctx.moments else torch.empty_like(z)
        if ctx.moments:
            own = unit.own(slice(None))
            for (a, b), products in zip(ctx.pairs, kept, strict=True):
                grad[a].addmm_(own[b], products.T)
                grad[b].addmm_(own[a], products)
            del own
        else:
            for part in blocks(z[0], images):
                grams = kept or unit.grams(part)
                every = sum(grams[1:], grams[0]) if views > 2 else None
                for v in range(views):
                    others = grams[1 - v] if every is None else every - grams[v]
                    torch.matmul(others, unit.every(v), out=grad[v][part])
        # `grad` is now the gradient by the standardised features. Standardising projects it onto
        # what is orthogonal to a constant and to the features. The features add up to zero, and so
        # does `grad`, but for a rounding error that counts where a mean is large beside its
        # deviation.
        moments, cached = list[Tensor](), _or_empty(in_cache(z))
        for part in cached:
            own, out = unit.own(part), grad[:, part].mul_(by_square)
            for (a, b), weight in zip(ctx.pairs, by_diagonal, strict=True):
                out[a].addcmul_(own[b], weight)
                out[b].addcmul_(own[a], weight)
            add_up(moments, torch.stack([out.sum(1), own.sum(1), (out * own).sum(1)]))
        constant, offset, along = ctx.comm.sum(moments[0]) / images
        shift = constant.addcmul(along, offset, value=-1)
        for part in cached:
            out = grad[:, part].addcmul_(unit.own(part), along[:, None], value=-1)
            out.sub_(shift[:, None]).mul_(inverse[:, None])
        return grad, None, None, None, None


def _or_empty(parts: Iterator[slice]) -> list[slice]:
    """All parts, or an empty one: of a view group a member may have no image to compute with."""
    return list(parts) or [slice(0, 0)]


class _Unit(NamedTuple):
    """Standardised features, from `z` `[K, m, d]`, mean and inverse deviation `[K, d]`.

    `rows`: those of all images `[K, N, d]`, or none where they are computed from `z`.
    """

    z: Tensor
    mean: Tensor
    inverse: Tensor
    rows: Tensor | None
    comm: Comm

    def own(self, part: slice) -> Tensor:
        """Of the images in a part of `z`, `[K, ..., d]`."""
        if self.rows is not None:
            return self.rows[:, self._place][:, part]
        return (self.z[:, part] - self.mean[:, None]).mul_(self.inverse[:, None])

    def every(self, view: int) -> Tensor:
        """Of all images in a view, `[N, d]`."""
        if self.rows is not None:
            return self.rows[view]
        return (self.z[view] - self.mean[view]).mul_(self.inverse[view])

    def grams(self, part: slice) -> list[Tensor]:
        """For each view, the products of the images in a part of `z` with all, `[m, N]`."""
        found = []
        for view in range(len(self.z)):
            every = self.every(view)
            found.append(gram(every[self._place][part], every))
            del every
        return found

    @property
    def _place(self) -> slice:
        """Where the images of `z` are among all."""
        comm, count = self.comm, self.z.shape[1]
        if self.rows is None:
            return slice(None)
        first = comm.rows(self.rows.shape[1] // comm.data_shards).start + comm.view_rank
        return slice(first, first + count * comm.view_shards, comm.view_shards)
