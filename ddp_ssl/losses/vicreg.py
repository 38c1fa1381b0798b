"""VICReg over the global batch, for two views and for many."""

from typing import NamedTuple

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import Route, at_least_float32, check_views
from ddp_ssl.losses.kernels.rows import rows_of
from ddp_ssl.losses.kernels.vicreg import Formula, terms


class VICReg(NamedTuple):
    """The weighted loss and its unweighted terms. Only the loss has a gradient.

    For another weighting call the loss with other weights: a sum of the terms trains nothing.
    """

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
) -> VICReg:
    """VICReg for K >= 2 views; at K = 2 the published loss.

        loss = invariance * s + variance * v + covariance * c
        s = 1/(N d) mean over pairs of views of |Z_k - Z_m|^2
          = 2K/(K-1) * 1/(K N d) sum_k |Z_k - mean Z|^2                              at O(K)
        v = 2/K sum_k 1/d sum_j max(0, gamma - sqrt(Var(Z_k)_j + eps))
        c = 2/K sum_k 1/d sum_{j != l} Cov(Z_k)_jl^2

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns scalars in float32
    or float64, the full values on every process. `route`: see `losses.common.gathers`. Raises
    `ValueError` for one view or one image.

    Source: VICReg (Bardes et al. 2022), Eq. 1 to 6, with solo-learn's divisors.
    `average_variance`: 1/K in v, as the official code.
    """
    views, images = check_views("vicreg", z, comm)
    factors = (
        2 / ((views - 1) * images * z.shape[2]),
        (1 if average_variance else 2) / (views * z.shape[2]),
        2 / (views * z.shape[2] * (images - 1) ** 2),
    )
    weights = invariance, variance, covariance
    with torch.autocast(z.device.type, enabled=False):
        formula = Formula(weights, factors, gamma, eps, views, images)
        return VICReg(*terms(z, formula, route, comm))


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

    With O_k the mean of the views other than k:

        loss = invariance * s + variance * v + covariance * c
        s = mean over k of 1/(N d) |Z_k - O_k|^2
        v = mean over k of v(Z_k)/2 + v(O_k)/2
        c = mean over k of c(Z_k) + c(O_k)
        v(X) = 1/d sum_j max(0, gamma - sqrt(Var(X)_j + eps)),  c(X) = 1/d sum_{j != l} Cov(X)_jl^2

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process). Returns scalars in float32
    or float64, the full values on every process. `route`: see `losses.common.gathers`. Raises
    `ValueError` for one view or one image.

    Source: Ghosh et al. 2023 (small projectors and multiple views), fastssl, which has no `eps`: a
    constant feature's gradient is NaN there.
    """
    views, images = check_views("vicreg_multiview", z, comm)
    width = z.shape[2]
    with torch.autocast(z.device.type, enabled=False):
        rows = rows_of(at_least_float32(z), route, comm)
        own = rows.values
        others = (own.sum(0) - own) / (views - 1)
        s = rows.total((own - others).square().sum()) / (views * images * width)
        # With two views, O_0 is Z_1 and O_1 is Z_0.
        every = torch.cat([own, others]) if views > 2 else own
        centred = every - rows.total(every.sum(1))[:, None] / images
        squares = torch.stack([rows.squared_product(x, x) for x in centred]) / (images - 1) ** 2
        var = rows.total(centred.square().sum(1)) / (images - 1)
        v = (gamma - (var + eps).sqrt()).clamp(min=0).mean()
        c = 2 * ((squares - var.square().sum(1)) / width).mean()
        loss = invariance * s + variance * v + covariance * c
        return VICReg(loss, s.detach(), v.detach(), c.detach())
