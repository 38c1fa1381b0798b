"""Queues of embeddings of earlier batches. Not a method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddp_ssl.config import Config
from ddp_ssl.losses.common import unit_rows


class Queue(nn.Module):
    """The newest `size` unit rows of each of `count` queues, `rows` `[count, size, width]`.

    First in, first out. Random unit rows to begin with, the same on every rank. Replicated: every
    rank appends the same gathered rows in the canonical order, so all hold the same at any number
    of processes and view shards. In float32 65,536 x 256 are 64 MiB on every rank and in the
    checkpoint, for each queue.

    `size` need not be a multiple of the batch: the new rows overwrite the oldest and go on at the
    beginning where they reach the end.
    """

    rows: Tensor
    oldest: Tensor

    def __init__(self, size: int, width: int, count: int = 1) -> None:
        super().__init__()
        self.register_buffer("rows", unit_rows(torch.randn(count, size, width)))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def append(self, rows: Tensor) -> None:
        """Rows `[count, N, width]` of the whole batch, normalised here, in place of the oldest."""
        size, new = self.rows.shape[1], rows.shape[1]
        places = (self.oldest + torch.arange(new, device=rows.device)) % size
        self.rows.index_copy_(1, places, unit_rows(rows).to(self.rows.dtype))
        self.oldest.copy_((self.oldest + new) % size)


def check_queue_size(size: int, config: Config) -> None:
    """Raise `ValueError` for a queue that one batch would overrun."""
    batch = config.data.batch_size
    if size < batch:
        raise ValueError(
            f"method.queue_size: {size} rows cannot take the {batch} images of a batch; "
            f"{batch} or more would be accepted"
        )
