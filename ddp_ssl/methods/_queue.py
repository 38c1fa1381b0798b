"""Queues of embeddings of earlier batches. This file is no method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddp_ssl.config import Config
from ddp_ssl.losses.common import unit_rows


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

    @torch.no_grad()
    def append(self, rows: Tensor) -> None:
        """Replace the oldest rows by a whole batch's `[count, N, width]`, normalised here."""
        size, new = self.rows.shape[1], rows.shape[1]
        places = (self.oldest + torch.arange(new, device=rows.device)) % size
        self.rows.index_copy_(1, places, unit_rows(rows).to(self.rows.dtype))
        self.oldest.copy_((self.oldest + new) % size)


def check_queue_size(size: int, config: Config) -> None:
    """Raise `ValueError` for a queue smaller than a batch."""
    batch = config.data.batch_size
    if size < batch:
        raise ValueError(
            f"method.queue_size: {size} rows cannot take the {batch} images of a batch; "
            f"{batch} or more would be accepted"
        )
