"""Maximum manifold capacity representations over the global batch."""

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import all_views, at_least_float32, unit_rows


def mmcr(z: Tensor, weight: float = 0.0, *, comm: Comm = ONE_PROCESS) -> Tensor:
    """MMCR for any number of views: a large nuclear norm of the mean embeddings.

        loss = -|M|_* + weight * 1/N sum_i |Z_i|_*

    Row i of M `[N, d]` is the mean of image i's normalised views (not normalised again), and Z_i
    `[K, d]` holds these views. The first term is not divided by N.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process), normalised within. Returns a
    scalar in float32 or float64 whose mean over processes is the global loss. Raises `ValueError`
    for another shape. The gradient of |M|_* is U V^T, finite where singular values vanish or
    coincide.

    Source: Yerxa et al. 2023, Eq. 5, and their code. Their code gathers without gradient and so
    trains with the gradient divided by the number of processes; here it is the loss's own.
    """
    if z.dim() != 3:
        raise ValueError(f"mmcr: expected z of shape [K, N, d], got {list(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        z = unit_rows(at_least_float32(z))
        loss = -nuclear_norms(comm.gather(z).mean(0))
        if weight:
            mine = all_views(z, comm).transpose(0, 1)  # [n, K, d]
            loss = loss + weight * nuclear_norms(mine).mean()
        return loss


def nuclear_norms(x: Tensor) -> Tensor:
    """Sums of singular values of matrices `[..., m, n]`; NaN of what is not finite.

    So a run that diverges ends with the loss's own line.
    """
    try:
        norms: Tensor = torch.linalg.svdvals(x).sum(-1)
        return norms
    except RuntimeError:
        if x.isfinite().all():
            raise
        return x.sum((-2, -1)) * torch.nan
