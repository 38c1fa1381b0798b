"""InfoNCE over the global batch."""

import warnings

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import check_temperature, compared
from ddp_ssl.losses.kernels.info_nce import anchor_losses
from ddp_ssl.losses.kernels.unit_rows import UnitRows

# The lowest temperature at which exp((cosine - 1) / temperature) >= exp(-2 / temperature) does not
# underflow.
LOWEST = {torch.float32: 1 / 40, torch.float64: 1 / 350}


def info_nce(
    z: Tensor, temperature: float, comm: Comm = ONE_PROCESS, gathered: UnitRows | None = None
) -> Tensor:
    """NT-Xent, averaged over all pairs of views: SimCLR's loss at K = 2.

        loss = mean over anchors (k, i) and other views m of
               -log [ exp s(k,i,m,i) / sum over (v, j) of exp s(k,i,v,j) ]

    s is the cosine divided by `temperature`. (v, j) are all 2N samples of the views k and m but
    the anchor itself.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process), normalised within.
    `gathered`: `gather_unit_rows(z, comm)`, if the caller has it already; no gradient flows into
    it. Returns a scalar in float32 or float64: the full loss on every process.
    Raises `ValueError` for one view and for a temperature below 1/350; warns for one image. Below
    1/40 it is computed in float64.

    Each process computes the rows of its own anchors, in blocks, so that memory is a few blocks and
    not N x N.

    Source: SimCLR (Chen et al. 2020), Eq. 1; AdaDim Eq. 4; pairs of K > 2 views as CMC (Tian et al.
    2020).
    """
    if z.dim() != 3:
        raise ValueError(f"info_nce: expected z of shape [K, N, d], got {list(z.shape)}")
    check_temperature("info_nce", temperature=temperature)
    if temperature < LOWEST[torch.float64]:
        raise ValueError(f"info_nce: temperature must be 1/350 or more, got {temperature}")
    with torch.autocast(z.device.type, enabled=False):
        wide = torch.promote_types(z.dtype, torch.float32)
        dtype = wide if temperature >= LOWEST[wide] else torch.float64
        rows = compared(z, comm, gathered, dtype)
        views, images, _ = rows.everyone.values.shape
        if views < 2:
            raise ValueError(f"info_nce: needs 2 views or more, got {views}")
        if images < 2:
            warnings.warn("info_nce: one image has no negatives, so its loss is always 0")
        total = comm.sum(anchor_losses(rows, temperature, comm))
        return (total / (views * images * (views - 1))).to(wide)
