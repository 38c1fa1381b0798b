"""Metrics that compare views of the same images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.comm import ONE_PROCESS, Comm


def alignment(x: Tensor, comm: Comm = ONE_PROCESS) -> float:
    """Mean |u - u'|^2 over the images and the pairs of their views, `x` `[q, n, d]` held here.

    u are the rows scaled to length one; in [0, 4], 0 where all views of an image are equal. The
    processes hold different images; their numbers may differ. Not centred. Raises `ValueError` for
    fewer than two views or no image. Source: Wang & Isola 2020, Eq. 4 with alpha = 2.
    """
    views, images = _check("alignment", x, comm)
    unit = F.normalize(x.detach().double(), dim=2, eps=1e-12)
    # The mean over pairs of q views is 2 / (q - 1) times the squared distances to their mean.
    apart = (unit - unit.mean(0)).square().sum()
    return float(comm.sum(apart)) * 2 / ((views - 1) * images)


def lidar(x: Tensor, comm: Comm = ONE_PROCESS, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """LiDAR: how many dimensions tell images apart, of views `x` `[q, n, d]` of the images here.

        exp(-sum p log p),  p = (eigenvalues of S_w^-1/2 S_b S_w^-1/2 + eps) / their sum

    S_b is the covariance of the images' mean rows (divisor M - 1), S_w the mean covariance of an
    image's views (divisor q - 1) plus `delta` I, so both are centred. At most d; 0 where the mean
    eigenvalue is at most `eps`. The processes hold different images; the covariances are
    all-reduced in float64, and every process returns rank 0's value. Raises `ValueError` for fewer
    than two views or two images. Source: Thilak et al. 2024.
    """
    views, images = _check("lidar", x, comm)
    if images < 2:
        raise ValueError(f"lidar: expected two images or more, got {images}")
    x = x.detach().double()
    means = x.mean(0)
    within = (x - means).flatten(0, 1)
    between = means - comm.sum(means.sum(0)) / images
    s_w = comm.sum(within.T @ within) / (images * (views - 1))
    s_b = comm.sum(between.T @ between) / (images - 1)
    s_w.diagonal().add_(delta)
    value = float("nan")
    if comm.rank == 0 and s_w.isfinite().all() and s_b.isfinite().all():
        factor = torch.linalg.cholesky(s_w)
        # L^-1 S_b L^-T has the same eigenvalues as the symmetric form.
        half = torch.linalg.solve_triangular(factor, s_b, upper=False)
        whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
        eigenvalues = torch.linalg.eigvalsh((whitened + whitened.T) / 2).clamp(min=0)
        p = (eigenvalues + eps) / (eigenvalues + eps).sum()
        nothing = float(eigenvalues.sum()) <= eps * len(eigenvalues)
        value = 0.0 if nothing else float(torch.special.entr(p).sum().exp())
    return comm.broadcast(value)


def _check(name: str, x: Tensor, comm: Comm) -> tuple[int, int]:
    """Views and images over all processes; raises `ValueError` on all together."""
    held = x.shape[1] if x.dim() == 3 and x.shape[0] >= 2 else 0
    images = int(comm.sum(x.new_full((), held, dtype=torch.float64)))
    if not images:
        raise ValueError(f"{name}: expected two views or more [q, n, d], got {list(x.shape)}")
    return x.shape[0], images
