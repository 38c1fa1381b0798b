"""What several losses share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.losses.pairs import gram_product, moment_product


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:
    """The last dimension scaled to length one; a zero row stays zero, with gradient zero.

    In `x`'s precision, but float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return x / torch.where(norm <= eps, math.inf, norm)


def gather_rows(x: Tensor, wide: Tensor, comm: Comm) -> Tensor:
    """All processes' `wide`, which is `x` `[k, n, d]` in float32 or wider; without gradient.

    Where `x` is narrower (autocast's half precision) it is `x` that is sent: half the bytes.
    """
    if _better_sent(wide, x, comm):
        return comm.gather(wide.detach())
    return comm.gather(x.detach()).to(wide.dtype)


def gather_unit_rows(x: Tensor, unit: Tensor, comm: Comm) -> Tensor:
    """All processes' `unit`, the unit rows of `x` `[k, n, d]`, as `[K, N, d]`; without gradient.

    Where `x` is narrower than `unit` (autocast's half precision) it is `x` that is sent, and its
    rows are scaled by the receivers: the same numbers (to rounding), half the bytes.
    """
    if _better_sent(unit, x, comm):
        return comm.gather(unit.detach())
    everyone = comm.gather(x.detach())
    return unit_rows(everyone if unit.dtype == torch.float32 else everyone.to(unit.dtype))


def _better_sent(made: Tensor, x: Tensor, comm: Comm) -> bool:
    """Whether to gather what was made of `x`, not `x`: nobody has to make it again."""
    return comm.world_size == 1 or x.element_size() >= made.element_size()


def check_directions(loss: str, **rows: Tensor) -> None:
    """Raise `ValueError` unless all are `[N, d]` of one shape."""
    shapes = {name: list(x.shape) for name, x in rows.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or any(shape != first for shape in shapes.values()):
        got = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{loss}: expected {' and '.join(shapes)} of one shape [N, d], got {got}")


def check_queue(loss: str, queue: Tensor, width: int) -> None:
    """Raise `ValueError` unless `queue` is `[Q, width]`."""
    if queue.dim() != 2 or queue.shape[1] != width or not len(queue):
        raise ValueError(f"{loss}: expected queue [Q, {width}], got {list(queue.shape)}")


def check_temperature(loss: str, **temperatures: float) -> None:
    """Raise `ValueError` unless all are positive."""
    for name, value in temperatures.items():
        if value <= 0:
            raise ValueError(f"{loss}: {name} must be positive, got {value}")


Route = Literal["auto", "gather", "moments"]


def gathers(route: Route, images: int, width: int) -> bool:
    """Whether second moments of `images` rows of `width` go through products of all pairs of rows.

    `gather` communicates the rows (N d numbers) and computes n N d products on each process, its
    own rows against all; `moments` communicates and sums d x d matrices (d^2 numbers, n d^2
    products). Both are exact; `auto` takes the smaller.
    """
    return images < width if route == "auto" else route == "gather"


@dataclass(frozen=True)
class Rows:
    """Views of images held here, and sums over all images.

    `values` `[K, n, ...]`: all views of the images held here; `total` turns a sum over these images
    into the sum over all `images`, on every process.
    """

    values: Tensor
    images: int
    route: Route
    comm: Comm

    def total(self, x: Tensor) -> Tensor:
        """Sum over all images, from the sum over those held here."""
        # The members of a view group hold the same images, so each counts for its part.
        return self.comm.sum(x / self.comm.view_shards)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over all images of `x` `[n, ...]`, which belongs to these rows."""
        return self.total(x.sum(0)) / self.images

    def squared_product(self, a: Tensor, b: Tensor) -> Tensor:
        """|A^T B|_F^2 over all images, for `a` `[n, p]`, `b` `[n, q]` that belong to these rows."""
        if not gathers(self.route, self.images, min(a.shape[1], b.shape[1])):
            return self.total(moment_product(a, b, self.total))
        every_a = self._gather(a)
        every_b = every_a if a is b else self._gather(b)
        mine = slice(self.comm.view_rank, None, self.comm.view_shards)
        part_a = a[mine]
        part_b = part_a if a is b else b[mine]
        return self.comm.sum(gram_product(part_a, part_b, every_a, every_b))

    def _gather(self, x: Tensor) -> Tensor:
        return self.comm.gather(x.detach()[None])[self.comm.view_rank]


def rows_of(z: Tensor, route: Route, comm: Comm) -> Rows:
    """The rows behind a loss made of sums over the global batch; `z` `[k, n, ...]` as held here."""
    return Rows(all_views(z, comm), z.shape[1] * comm.data_shards, route, comm)


def all_views(x: Tensor, comm: Comm) -> Tensor:
    """`[k, n, ...]` held here to `[K, n, ...]`: all views, in order, of the images held here.

    Gradients are summed over the view shards.
    """
    if comm.view_shards == 1:
        return x
    whole = x.new_zeros(x.shape[0] * comm.view_shards, *x.shape[1:])
    whole[comm.views] = x
    return comm.view_sum(whole)
