"""The losses of MoCo: against a queue (v2), against the other images of the batch (v3)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, check_directions, check_temperature, unit_rows


def moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo v2's loss in one direction: each query's own key against the keys of a queue.

        loss = mean over images of -log [ exp(q . k_+ / tau) / sum_j exp(q . k_j / tau) ]

    k_+ is the image's own key; the k_j are k_+ and the queue's keys.

    `query`: `[N, d]`, `key`: the momentum network's `[N, d]` of another view of the same images,
    both normalised within; `queue`: unit rows `[Q, d]`. Gradient flows into `query` alone. Returns
    a scalar in float32 or float64. The queue is the same on every process and images of the batch
    do not meet, so the mean over processes is the global loss. Raises `ValueError` for unequal
    shapes and unless `temperature` is positive.

    Source: MoCo (He et al. 2020), Eq. 1. MoCo v2+ (solo-learn) takes the mean of two directions.
    """
    check_directions("moco", queue, query=query, key=key)
    check_temperature("moco", temperature=temperature)
    with torch.autocast(query.device.type, enabled=False):
        q, k = unit_rows(at_least_float32(query)), unit_rows(at_least_float32(key.detach()))
        q = q / temperature  # [N, d], in place of the [N, Q + 1] logits
        positive = (q * k).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ queue.detach().to(q.dtype).T], 1)
        return cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def mocov3(
    query: Tensor,
    key: Tensor,
    temperature: float,
    *,
    comm: Comm = ONE_PROCESS,
    gathered: Tensor | None = None,
) -> Tensor:
    """MoCo v3's loss in one direction: each query's own key among the keys of the global batch.

        loss = 2 tau * mean over i of -log [ exp(q_i . k_i / tau) / sum_j exp(q_i . k_j / tau) ]

    `query`: `[n, d]`, `key`: the momentum network's `[n, d]` of another view of the same images,
    both of the images held here and normalised within. `gathered`: the keys of all images `[N, d]`
    if the caller has them already. Gradient flows into `query` alone. Returns a scalar in float32
    or float64: the mean over the queries held here, whose mean over processes is the global loss.
    Raises `ValueError` for unequal shapes and unless `temperature` is positive.

    Source: MoCo v3 (Chen, Xie & He 2021), Algorithm 1, which adds the two directions, as the method
    does.
    """
    check_directions("mocov3", query=query, key=key)
    check_temperature("mocov3", temperature=temperature)
    with torch.autocast(query.device.type, enabled=False):
        q = unit_rows(at_least_float32(query))
        with torch.no_grad():
            if gathered is None:
                gathered = comm.gather(at_least_float32(key)[None])[comm.view_rank]
            keys = unit_rows(gathered.to(q.dtype))
        places = torch.arange(len(keys), device=q.device)[comm.rows(len(q))]
        return 2 * temperature * cross_entropy(q / temperature @ keys.T, places)
