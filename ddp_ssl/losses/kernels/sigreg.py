"""Sums of cos(f x) and sin(f x) over rows: an empirical characteristic function."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def characteristic_sums(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    """`[k, n, m]` to `[k, T, 2, m]`: sums over the n rows of cos and sin at T frequencies.

    Only `x` is kept for the backward pass, which computes the functions again: with autograd alone
    2 T tensors of this size would be kept.
    """
    return cast(Tensor, _Sums.apply(x, tuple(frequencies)))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frequencies: tuple[float, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.frequencies = frequencies
        sums = x.new_empty(x.shape[0], len(frequencies), 2, x.shape[2])
        for i, frequency in enumerate(frequencies):
            angle = x * frequency
            torch.sum(angle.cos(), 1, out=sums[:, i, 0])
            torch.sum(angle.sin_(), 1, out=sums[:, i, 1])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        total = torch.zeros_like(x)
        for i, frequency in enumerate(ctx.frequencies):
            of_cos, of_sin = (gradient[:, i, part, None] * frequency for part in (0, 1))
            angle = x * frequency
            total.addcmul_(angle.cos(), of_sin).addcmul_(angle.sin_(), of_cos, value=-1)
        return total, None
