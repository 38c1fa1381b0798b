"""The distance of empirical characteristic functions from the normal distribution's."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.comm import Comm
from ddp_ssl.losses.kernels.gram import in_cache


def distance(x: Tensor, gap: float, knots: int, comm: Comm) -> Tensor:
    """The mean over views and directions of N int |phi(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt.

    `x`: N numbers of each view and direction, `[k, n, m]` held here. `knots`: those at t > 0, `gap`
    apart. At t and -t the integrand is the same, and at t = 0 it is zero.

    Only `x` and the means of cos and sin are kept for the backward pass, which computes the
    functions again: with autograd alone 2 `knots` tensors of this size would be kept.
    """
    return cast(Tensor, _Distance.apply(x, gap, knots, comm))


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gap: float, knots: int, comm: Comm) -> Tensor:
        views, n, slices = x.shape
        views, images = views * comm.view_shards, n * comm.data_shards
        t = gap * torch.arange(1, knots + 1, device=x.device, dtype=x.dtype)
        sums = x.new_zeros(len(x), knots, 2, slices)
        for rows in _parts(x, t):
            angles = _angles(x[:, rows], t)
            sums[:, :, 0].add_(angles.cos().sum(2))
            sums[:, :, 1].add_(angles.sin_().sum(2))
        normal = t.square().mul_(-0.5).exp_()
        apart = comm.sum(comm.placed(sums)) / images
        apart[:, :, 0].sub_(normal[:, None])
        weights = normal * (2 * gap / (views * slices))
        weights[-1:].div_(2)
        found = images * torch.dot(apart.square().sum((0, 2, 3)), weights)
        # By the sum of cos(t x) or sin(t x), times t.
        slopes = apart[comm.views] * (2 * weights * t)[:, None, None]
        ctx.save_for_backward(x, t, slopes)
        ctx.comm = comm
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, t, slopes = ctx.saved_tensors
        of_cos, of_sin = slopes[:, :, :, None].unbind(2)
        grad = torch.empty_like(x)
        for rows in _parts(x, t):
            angles = _angles(x[:, rows], t)
            parts = angles.cos().mul_(of_sin).addcmul_(angles.sin_(), of_cos, value=-1)
            torch.sum(parts, 1, out=grad[:, rows])
        return grad.mul_(ctx.comm.sum(gradient)), None, None, None


def _parts(x: Tensor, t: Tensor) -> Iterator[slice]:
    """Slices of the rows of `x` `[k, n, m]` whose angles stay in the cache."""
    return in_cache(x[:1].expand(len(x) * len(t), -1, -1))


def _angles(x: Tensor, t: Tensor) -> Tensor:
    """`x` `[k, n, m]` times `t` `[T]`: `[k, T, n, m]`."""
    return x[:, None] * t[:, None, None]
