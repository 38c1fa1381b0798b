"""ReSSL's loss."""

import torch
from torch import Tensor

from ddp_ssl.losses.common import at_least_float32, check_directions, check_temperature, unit_rows


def ressl(
    query: Tensor, key: Tensor, queue: Tensor, query_temperature: float, key_temperature: float
) -> Tensor:
    """Cross-entropy between the key's and the query's similarities to a queue.

        loss = mean over images of -sum_j softmax(k Q^T / tau_k)_j log softmax(q Q^T / tau_q)_j

    `query`: q, `[N, d]` of strongly augmented views; `key`: k, the momentum network's `[N, d]` of
    weakly augmented views of the same images; both normalised within. `queue`: Q, unit rows
    `[Q, d]`. Gradient flows into `query` alone. Returns a scalar in float32 or float64. The queue
    is the same on every process, so the mean over processes is the global loss. Raises `ValueError`
    for unequal shapes and unless both temperatures are positive.

    Source: ReSSL (Zheng et al. 2021), Eq. 3 to 5; one direction only.
    """
    check_directions("ressl", queue, query=query, key=key)
    check_temperature("ressl", query_temperature=query_temperature, key_temperature=key_temperature)
    with torch.autocast(query.device.type, enabled=False):
        q, k = unit_rows(at_least_float32(query)), unit_rows(at_least_float32(key.detach()))
        rows = queue.detach().to(q.dtype).T
        target = (k @ rows / key_temperature).softmax(1)
        return -(target * (q @ rows / query_temperature).log_softmax(1)).sum(1).mean()
