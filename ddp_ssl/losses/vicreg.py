"""VICReg over the global batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, global_rows


class VICReg(NamedTuple):
    """The weighted loss and its unweighted terms."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg(
    z: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    *,
    gamma: float = 1.0,
    eps: float = 1e-4,
    average_variance: bool = False,
    route: Literal["gather", "moments"] = "gather",
    comm: Comm = ONE_PROCESS,
    gathered: Tensor | None = None,
) -> VICReg:
    """VICReg for K >= 2 views; at K = 2 the published loss.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns scalars in float32
    or float64; the mean of `.loss` over processes is the global loss.

    invariance  2K/(K-1) * 1/(K N d) sum_k |Z_k - mean Z|^2, the mean over pairs at O(K)
    variance    2/K sum_k of 1/d sum_j max(0, gamma - sqrt(Var z_kj + eps)); 1/K with
                `average_variance`, as the official code
    covariance  2/K sum_k of 1/d sum of the squared off-diagonal covariances

    `route`: `gather` communicates the embeddings, `moments` the mean and the centred second moment,
    whose size does not depend on the number of processes. Source: VICReg (Bardes et al. 2022),
    Eq. 1 to 6, with solo-learn's divisors. Raises `ValueError` for one view or one image.
    """
    if z.dim() != 3:
        raise ValueError(f"vicreg: expected z of shape [K, N, d], got {list(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        k, n, width = z.shape
        views, images = k * comm.view_shards, n * comm.data_shards
        if views < 2:
            raise ValueError(f"vicreg: needs 2 views or more, got {views}")
        if images < 2:
            raise ValueError("vicreg: the variance needs 2 images or more, got 1")

        if route == "gather":
            everyone = comm.gather(z) if gathered is None else gathered.to(z.dtype)
            mine = everyone[:, comm.rows(n)]
            spread = (mine - mine.mean(0)).square().sum() / (views * n * width)
            centred = everyone - everyone.mean(1, keepdim=True)
            var = centred.square().sum(1) / (images - 1)  # [K, d]
            squares = _squared_norm_of_covariance(centred) / (images - 1) ** 2
        else:
            mean_view = comm.view_sum(z.sum(0)) / views
            # Each process sees k of the K views: their mean square, averaged over the view shards.
            spread = (z - mean_view).square().sum() / (k * n * width)
            sums = z.new_zeros(views, width)
            sums[comm.views] = z.sum(1)
            mean = comm.sum(sums)[comm.views] / images
            local = z - mean[:, None]
            outer = z.new_zeros(views, width, width)
            outer[comm.views] = local.transpose(1, 2) @ local
            cov = comm.sum(outer) / (images - 1)  # [K, d, d]
            var = cov.diagonal(dim1=1, dim2=2)
            squares = cov.square().sum((1, 2))

        s = 2 * views / (views - 1) * spread
        hinge = (gamma - (var + eps).sqrt()).clamp(min=0).mean(1)
        off_diagonal = (squares - var.square().sum(1)) / width
        v = hinge.mean() * (1 if average_variance else 2)
        c = off_diagonal.mean() * 2
        return VICReg(invariance * s + variance * v + covariance * c, s, v, c)


def vicreg_multiview(
    z: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    *,
    gamma: float = 1.0,
    eps: float = 1e-12,
    route: Literal["gather", "moments"] = "gather",
    comm: Comm = ONE_PROCESS,
    gathered: Tensor | None = None,
) -> VICReg:
    """VICReg of K views against the mean of the others, in O(K), as fastssl defines it.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns scalars in float32
    or float64, the full values on every process. With O_k the mean of the views other than k:

    invariance  mean over k of the mean squared element of Z_k - O_k
    variance    mean over k of v(Z_k)/2 + v(O_k)/2, v = 1/d sum_j max(0, gamma - sqrt(Var_j + eps))
    covariance  mean over k of c(Z_k) + c(O_k), c = 1/d sum of the squared off-diagonal covariances

    `route`: see `global_rows`. Source: Ghosh et al. 2023 (small projectors and multiple views),
    fastssl, which has no `eps` (a constant feature's gradient is then NaN). Raises `ValueError` for
    one view or one image.
    """
    if z.dim() != 3:
        raise ValueError(f"vicreg_multiview: expected z of shape [K, N, d], got {list(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        rows = global_rows(at_least_float32(z), route, comm, gathered)
        own, images = rows.values, rows.images
        views, _, width = own.shape
        if views < 2:
            raise ValueError(f"vicreg_multiview: needs 2 views or more, got {views}")
        if images < 2:
            raise ValueError("vicreg_multiview: the variance needs 2 images or more, got 1")
        others = (own.sum(0) - own) / (views - 1)
        s = rows.total((own - others).square().sum()) / (views * images * width)
        # Of two views, the others are the views themselves, exchanged.
        every = torch.cat([own, others]) if views > 2 else own
        centred = every - rows.total(every.sum(1))[:, None] / images
        if route == "gather":
            squares = _squared_norm_of_covariance(centred) / (images - 1) ** 2
        else:
            outer = rows.total(centred.transpose(1, 2) @ centred)
            squares = outer.square().sum((1, 2)) / (images - 1) ** 2
        var = rows.total(centred.square().sum(1)) / (images - 1)
        v = (gamma - (var + eps).sqrt()).clamp(min=0).mean()
        c = 2 * ((squares - var.square().sum(1)) / width).mean()
        return VICReg(invariance * s + variance * v + covariance * c, s, v, c)


def _squared_norm_of_covariance(centred: Tensor) -> Tensor:
    """|X^T X|_F^2 per view for X `[K, N, d]`, through the smaller of the two Gram matrices."""
    _, images, width = centred.shape
    if images < width:
        gram = centred @ centred.transpose(1, 2)
    else:
        gram = centred.transpose(1, 2) @ centred
    return gram.square().sum((1, 2))
