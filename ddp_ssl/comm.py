"""The communication that a loss or a metric needs, and its default for one process.

Losses and metrics take a `Comm` and import nothing but torch. `distributed.MeshComm` is the
implementation that communicates. So one definition serves one process and 512.

Shapes: a process holds some views of some images, `[k, n, ...]`; the gathered tensor is
`[K, N, ...]` in one canonical order. Images are split over data shards in contiguous blocks, views
over view shards in turn.
"""

from torch import Tensor


class Comm:
    """One process that holds everything: every operation is the identity."""

    rank: int = 0
    world_size: int = 1
    view_shards: int = 1

    @property
    def data_shards(self) -> int:
        """Number of parts that the images are split into."""
        return self.world_size // self.view_shards

    @property
    def data_rank(self) -> int:
        """Index of the part of the images held here."""
        return self.rank // self.view_shards

    @property
    def view_rank(self) -> int:
        """Index of the part of the views held here."""
        return self.rank % self.view_shards

    def rows(self, n: int) -> slice:
        """The places of the `n` images held here among all `N`."""
        return slice(self.data_rank * n, (self.data_rank + 1) * n)

    @property
    def views(self) -> slice:
        """The places of the views held here among all `K`."""
        return slice(self.view_rank, None, self.view_shards)

    def placed(self, x: Tensor) -> Tensor:
        """`[k, ...]` of the views held here among all views `[K, ...]`, the others' rows zero."""
        if self.view_shards == 1:
            return x
        whole = x.new_zeros(x.shape[0] * self.view_shards, *x.shape[1:])
        whole[self.views] = x
        return whole

    def gather(self, x: Tensor) -> Tensor:
        """`[k, n, ...]` of every process as `[K, N, ...]`; gradients are summed over processes."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all processes; gradients are summed over processes too."""
        return x

    def view_sum(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other views of the same images."""
        return x

    def view_union(self, found: dict[int, str]) -> dict[int, str]:
        """The entries of all processes that read the same images; on the host."""
        return found

    def broadcast(self, value: float) -> float:
        """Rank 0's value, the same bits everywhere."""
        return value


ONE_PROCESS = Comm()
