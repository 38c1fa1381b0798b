"""What several losses share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddp_ssl.comm import Comm


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:
    """The last dimension scaled to length one; a zero row stays zero, with gradient zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > eps, x / norm.clamp(min=eps), torch.zeros_like(x))


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


@dataclass(frozen=True)
class Rows:
    """Views of images whose sums over all images every process can form.

    `values` `[K, m, ...]`: the views of all N images, or of the images held here; `total` turns a
    sum over these m images into the sum over all `images`, on every process.
    """

    values: Tensor
    images: int
    total: Callable[[Tensor], Tensor]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over all images of `x` `[m, ...]`, which belongs to these rows."""
        return self.total(x.sum(0)) / self.images

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`A^T B` over all images, for `a` `[m, p]` and `b` `[m, q]` that belong to these rows."""
        return self.total(a.T @ b)


def global_rows(
    z: Tensor, route: Literal["gather", "moments"], comm: Comm, gathered: Tensor | None = None
) -> Rows:
    """The rows behind a loss made of sums over the global batch; `z` `[k, n, ...]` as held here.

    `gather` communicates the embeddings (N d numbers), `moments` whatever sums are formed (d^2 for
    a correlation, however many processes there are); gradients flow through both.
    """
    images = z.shape[1] * comm.data_shards
    if route == "gather":
        return Rows(comm.gather(z) if gathered is None else gathered.to(z.dtype), images, _same)
    # The members of a view group hold the same images, so each counts for its part.
    return Rows(all_views(z, comm), images, lambda x: comm.sum(x / comm.view_shards))


def all_views(x: Tensor, comm: Comm) -> Tensor:
    """`[k, n, ...]` held here to `[K, n, ...]`: all views, in order, of the images held here.

    Gradients are summed over the view shards.
    """
    if comm.view_shards == 1:
        return x
    whole = x.new_zeros(x.shape[0] * comm.view_shards, *x.shape[1:])
    whole[comm.views] = x
    return comm.view_sum(whole)


def _same(x: Tensor) -> Tensor:
    return x
