"""VICReg over the global batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import Route, at_least_float32, gathers, rows_of
from ddp_ssl.losses.pairs import gram_product


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
    route: Route = "auto",
    comm: Comm = ONE_PROCESS,
    gathered: Tensor | None = None,
) -> VICReg:
    """VICReg for K >= 2 views; at K = 2 the published loss.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns scalars in float32
    or float64; the mean of `.loss` over processes is the global loss. `gathered`: `comm.gather(z)`
    if the caller has it already; no gradient flows into it.

    invariance  2K/(K-1) * 1/(K N d) sum_k |Z_k - mean Z|^2, the mean over pairs at O(K)
    variance    2/K sum_k of 1/d sum_j max(0, gamma - sqrt(Var z_kj + eps)); 1/K with
                `average_variance`, as the official code
    covariance  2/K sum_k of 1/d sum of the squared off-diagonal covariances

    `route`: see `losses.common.gathers`. Source: VICReg (Bardes et al. 2022),
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

        mean_view = comm.view_sum(z.sum(0)) / views
        # Each process sees k of the K views: their mean square, averaged over the view shards.
        spread = (z - mean_view).square().sum() / (k * n * width)

        def total(x: Tensor) -> Tensor:
            """Sums over all images `[K, ...]`, of every view, from those held here `[k, ...]`."""
            sums = x.new_zeros(views, *x.shape[1:])
            sums[comm.views] = x
            return comm.sum(sums)

        mean = total(z.sum(1))[comm.views, None] / images
        local = z - mean
        if gathers(route, images, width):
            everyone = comm.gather(z.detach()) if gathered is None else gathered.detach()
            centred = everyone[comm.views].to(z.dtype) - mean.detach()
            parts = [gram_product(a, a, b, b) for a, b in zip(local, centred, strict=True)]
            sums = total(torch.cat([local.square().sum(1), torch.stack(parts)[:, None]], 1))
            var, squares = sums[:, :-1] / (images - 1), sums[:, -1] / (images - 1) ** 2
        else:
            cov = total(local.transpose(1, 2) @ local) / (images - 1)  # [K, d, d]
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
    route: Route = "auto",
    comm: Comm = ONE_PROCESS,
) -> VICReg:
    """VICReg of K views against the mean of the others, in O(K), as fastssl defines it.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns scalars in float32
    or float64, the full values on every process. With O_k the mean of the views other than k:

    invariance  mean over k of the mean squared element of Z_k - O_k
    variance    mean over k of v(Z_k)/2 + v(O_k)/2, v = 1/d sum_j max(0, gamma - sqrt(Var_j + eps))
    covariance  mean over k of c(Z_k) + c(O_k), c = 1/d sum of the squared off-diagonal covariances

    `route`: see `losses.common.gathers`. Source: Ghosh et al. 2023 (small projectors and multiple
    views), fastssl, which has no `eps` (a constant feature's gradient is then NaN). Raises
    `ValueError` for one view or one image.
    """
    if z.dim() != 3:
        raise ValueError(f"vicreg_multiview: expected z of shape [K, N, d], got {list(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        rows = rows_of(at_least_float32(z), route, comm)
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
        squares = torch.stack([rows.squared_product(x, x) for x in centred]) / (images - 1) ** 2
        var = rows.total(centred.square().sum(1)) / (images - 1)
        v = (gamma - (var + eps).sqrt()).clamp(min=0).mean()
        c = 2 * ((squares - var.square().sum(1)) / width).mean()
        return VICReg(invariance * s + variance * v + covariance * c, s, v, c)
