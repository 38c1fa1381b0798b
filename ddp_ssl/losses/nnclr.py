"""NNCLR's loss and its search for nearest neighbours."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import (
    at_least_float32,
    check_directions,
    check_queue,
    check_temperature,
    unit_rows,
)


def nnclr(
    nearest: Tensor,
    p: Tensor,
    temperature: float,
    *,
    comm: Comm = ONE_PROCESS,
    gathered: Tensor | None = None,
) -> Tensor:
    """NNCLR's loss in one direction: each image's own prediction among those of the global batch.

        loss = mean over i of -log [ exp(NN_i . p_i / tau) / sum_j exp(NN_i . p_j / tau) ]

    `nearest`: NN, the queue's rows nearest to one view `[n, d]`; `p`: predictions `[n, d]` of
    another view of the same images; both of the images held here and normalised within. `gathered`:
    the predictions of all images `[N, d]`, with gradient, if the caller has them already. Gradient
    flows into `p` alone. Returns a scalar in float32 or float64: the mean over the anchors held
    here, whose mean over processes is the global loss. Raises `ValueError` for unequal shapes and
    unless `temperature` is positive.

    Source: NNCLR (Dwibedi et al. 2021), Eq. 3. lightly adds the anchors of the other direction to
    the candidates. The paper takes the mean of the two directions, as the method does.
    """
    check_directions("nnclr", nearest=nearest, p=p)
    check_temperature("nnclr", temperature=temperature)
    with torch.autocast(p.device.type, enabled=False):
        anchors = unit_rows(at_least_float32(nearest.detach()))
        if gathered is None:
            gathered = comm.gather(at_least_float32(p)[None])[comm.view_rank]
        candidates = unit_rows(gathered)
        places = torch.arange(len(candidates), device=p.device)[comm.rows(len(anchors))]
        return cross_entropy(anchors / temperature @ candidates.T, places)


@torch.no_grad()
def nearest_rows(z: Tensor, queue: Tensor) -> Tensor:
    """For each row of `z` `[..., d]` the row of `queue` `[Q, d]` with the largest cosine.

    The queue's rows have length one. Raises `ValueError` for another shape of the queue.
    """
    check_queue("nearest_rows", queue, z.shape[-1])
    with torch.autocast(z.device.type, enabled=False):
        z = unit_rows(at_least_float32(z))
        return queue[(z @ queue.to(z.dtype).T).argmax(-1)]
