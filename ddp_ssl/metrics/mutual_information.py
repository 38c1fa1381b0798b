"""Mutual information of a whole split, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.comm import ONE_PROCESS, Comm


def blocked_mutual_information(
    r: Tensor, z: Tensor, comm: Comm = ONE_PROCESS, chunk: int = 1024
) -> float:
    """I(R;Z) in nats of `r` `[M, d_R]` and `z` `[M, d]`, which every process holds whole.

    The estimator of `losses.mutual_information` in float64; the rows are shared among the
    processes and taken in chunks, so that no M x M matrix is kept.
    """
    r = F.normalize(r.double(), dim=1, eps=1e-12)
    z = F.normalize(z.double(), dim=1, eps=1e-12)
    sums = r.new_zeros(3)
    mine = torch.arange(comm.rank, len(r), comm.world_size, device=r.device)
    for start in range(0, len(mine), chunk):
        index = mine[start : start + chunk]
        a, b = (r[index] @ r.T).square(), (z[index] @ z.T).square()
        sums += torch.stack([a.sum(), b.sum(), (a * b).sum()])
    means = (comm.sum(sums) / len(r) ** 2).clamp(min=1 / len(r) ** 2)
    return float(torch.log(means[2] / (means[0] * means[1])))
