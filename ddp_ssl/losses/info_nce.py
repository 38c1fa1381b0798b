"""InfoNCE over the global batch."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, check_temperature, unit_rows


def info_nce(
    z: Tensor, temperature: float, comm: Comm = ONE_PROCESS, gathered: Tensor | None = None
) -> Tensor:
    """NT-Xent, averaged over all pairs of views: SimCLR's loss at K = 2.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process), normalised within.
    `gathered`: `comm.gather(z)` in float32 or wider, if the caller has it already. Returns a scalar
    in float32 or float64: the mean over the anchors held here, whose mean over processes is the
    global loss.

    For anchor (k, i) and each other view m: -s(k,i,m,i) + log of the sum of exp s over all 2N
    samples of views k and m but the anchor itself, with s = cosine / temperature. Source: SimCLR
    (Chen et al. 2020), Eq. 1; AdaDim Eq. 4; pairs of K > 2 views as CMC (Tian et al. 2020).
    """
    if z.dim() != 3:
        raise ValueError(f"info_nce: expected z of shape [K, N, d], got {list(z.shape)}")
    check_temperature("info_nce", temperature=temperature)
    with torch.autocast(z.device.type, enabled=False):
        # In float32 before it is sent: the cotangents of all ranks are summed on the way back.
        z = at_least_float32(z)
        everyone = comm.gather(z) if gathered is None else gathered
        views, images, _ = everyone.shape
        if views < 2:
            raise ValueError(f"info_nce: needs 2 views or more, got {views}")
        if images < 2:
            warnings.warn("info_nce: one image has no negatives, so its loss is always 0")
        k, n, _ = z.shape
        device = z.device
        held = torch.arange(views, device=device)[comm.views]
        rows = torch.arange(images, device=device)[comm.rows(n)]

        anchors = unit_rows(z)
        columns = unit_rows(at_least_float32(everyone))
        similarity = torch.einsum("kid,mjd->kimj", anchors, columns) / temperature
        positive = similarity[..., comm.rows(n)].diagonal(dim1=1, dim2=3).transpose(1, 2)
        itself = (held[:, None, None, None] == torch.arange(views, device=device)[:, None]) & (
            rows[:, None, None] == torch.arange(images, device=device)
        )
        block = similarity.masked_fill(itself, float("-inf")).logsumexp(-1)  # [k, n, K]

        # Indices of each anchor's own view [k, n, 1] and of the others [k, n, K - 1].
        own = held[:, None, None].expand(k, n, 1)
        others = torch.arange(views - 1, device=device)
        others = (others + (others >= held[:, None]))[:, None].expand(k, n, views - 1)
        denominator = torch.logaddexp(block.gather(2, own), block.gather(2, others))
        return (denominator - positive.gather(2, others)).mean()
