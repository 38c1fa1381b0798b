"""The images of each step: a pure function of seed, epoch, step and shard. numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.utils.seeds import generator

Ids = NDArray[np.int64]


def permutation(seed: int, epoch: int, n: int) -> Ids:
    """The order of `n` images in an epoch, int64 `[n]`."""
    return generator(seed, "order", epoch).permutation(n)


@dataclass
class Order:
    """The ids of every step, without end.

    An epoch has `size // global_batch` steps; the images left over are dropped, others each epoch.
    Step t of an epoch is `permutation[t * N : (t + 1) * N]` whatever the number of shards; shard r
    takes its r-th contiguous part, so rows gathered in rank order are in one canonical order.

    Raises `ValueError` (key `data.batch_size`) if the batch does not fit the data or the shards.
    """

    size: int
    global_batch: int
    shard: int
    num_shards: int
    seed: int
    _epochs: dict[int, Ids] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.num_shards:
            raise ValueError(f"shard {self.shard} is not one of {self.num_shards}")
        if self.global_batch % self.num_shards:
            raise ValueError(
                f"data.batch_size: {self.global_batch} images cannot be split evenly over "
                f"{self.num_shards} shards"
            )
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"data.batch_size: {self.global_batch} images do not fit in the {self.size} "
                f"training images; at most {self.size} would be accepted"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.global_batch

    @property
    def local_batch(self) -> int:
        return self.global_batch // self.num_shards

    def ids(self, step: int) -> Ids:
        """This shard's images at global `step`, int64 `[global_batch // num_shards]`."""
        first = self.shard * self.local_batch
        return self.global_ids(step)[first : first + self.local_batch]

    def global_ids(self, step: int) -> Ids:
        """All shards' images at global `step`, int64 `[global_batch]`."""
        epoch, t = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            # Batches are read ahead over an epoch's end, so two epochs are in use there.
            self._epochs = {e: order for e, order in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = permutation(self.seed, epoch, self.size)
        return self._epochs[epoch][t * self.global_batch : (t + 1) * self.global_batch]
