"""ReSSL's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ddp_ssl.losses.common import (
    at_least_float32,
    check_directions,
    check_queue,
    check_temperature,
    unit_rows,
)


def ressl(
    query: Tensor, key: Tensor, queue: Tensor, query_temperature: float, key_temperature: float
) -> Tensor:
    """Cross-entropy of two distributions over a queue: where the key stands, where the query does.

    `query`: `[N, d]` of strongly augmented views, `key`: the momentum network's `[N, d]` of weakly
    augmented ones of the same images, both normalised within; `queue`: unit rows `[Q, d]`. Gradient
    flows into `query` alone. Returns a scalar in float32 or float64: the mean over images of
    -sum softmax(k Q^T / T_k) log softmax(q Q^T / T_q). The queue is the same on every process, so
    the mean over processes is the global loss.

    Source: ReSSL (Zheng et al. 2021), Eq. 3 to 5; one direction only.
    """
    check_directions("ressl", query=query, key=key)
    check_queue("ressl", queue, query.shape[1])
    check_temperature("ressl", query_temperature=query_temperature, key_temperature=key_temperature)
    with torch.autocast(query.device.type, enabled=False):
        q, k = unit_rows(at_least_float32(query)), unit_rows(at_least_float32(key.detach()))
        rows = queue.detach().to(q.dtype).T
        target = (k @ rows / key_temperature).softmax(1)
        return -(target * (q @ rows / query_temperature).log_softmax(1)).sum(1).mean()
