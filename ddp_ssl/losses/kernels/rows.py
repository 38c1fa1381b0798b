"""Sums over the images of the global batch, from the rows that each process holds."""

from dataclasses import dataclass

from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.losses.common import Route, all_views, gathers
from ddp_ssl.losses.kernels.gram import gram_product, moment_product


@dataclass(frozen=True)
class Rows:
    """All views of the images held here, and sums over all images.

    `values`: `[K, n, ...]`. `images`: their number over all processes.
    """

    values: Tensor
    images: int
    route: Route
    comm: Comm

    def total(self, x: Tensor) -> Tensor:
        """Sum over all images, from the sum over those held here."""
        # The members of a view group hold the same images, so each counts for its part.
        return self.comm.sum(x / self.comm.view_shards)

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
    """The rows of a loss made of sums over the global batch, from `z` `[k, n, ...]` held here."""
    return Rows(all_views(z, comm), z.shape[1] * comm.data_shards, route, comm)
