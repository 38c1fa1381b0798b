"""Queues of embeddings of earlier batches. This file is no method."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ddp_ssl.config import Config, MethodConfig
from ddp_ssl.losses.common import unit_rows


class QueueConfig(MethodConfig):
    """Base of the configs that have a `queue_size`."""

    def check(self, config: Config) -> None:
        """Refuse a queue smaller than a batch; 0 is no queue."""
        size, batch = cast(Any, self).queue_size, config.data.batch_size
        if 0 < size < batch:
            raise ValueError(
                f"method.queue_size: {size} rows cannot take the {batch} images of a batch; "
                f"{batch} or more would be accepted"
            )


class Queue(nn.Module):
    """The newest `size` unit rows of each of `count` queues, `rows` `[count, size, width]`.

    First in, first out. A queue starts with random unit rows, the same on every rank. It is
    replicated: every rank appends the same gathered rows in the canonical order, so all hold the
    same rows at any number of processes and view shards. For each queue of 65,536 x 256 in float32
    this takes 64 MiB on every rank and in the checkpoint.

    `size` need not be a multiple of the batch: new rows overwrite the oldest and continue at the
    beginning when they reach the end.
    """

    rows: Tensor
    oldest: Tensor

    def __init__(self, size: int, width: int, count: int = 1) -> None:
        super().__init__()
        self.register_buffer("rows", unit_rows(torch.randn(count, size, width)))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.newest: Tensor | None = None
        """Rows `[count, N, width]` of the step under way, for `append_newest`."""

    def append_newest(self) -> int:
        """Append `newest`, at the end of a step; returns N."""
        assert self.newest is not None
        newest, self.newest = self.newest, None
        self.append(newest)
        return newest.shape[1]

    @torch.no_grad()
    def append(self, rows: Tensor) -> None:
        """Replace the oldest rows by a whole batch's `[count, N, width]`, normalised here."""
        size, new = self.rows.shape[1], rows.shape[1]
        places = (self.oldest + torch.arange(new, device=rows.device)) % size
        self.rows.index_copy_(1, places, unit_rows(rows).to(self.rows.dtype))
        self.oldest.add_(new).remainder_(size)
