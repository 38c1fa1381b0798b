"""Rows of length one and their products, on tensor cores where the rows are in bf16.

A product of two bf16 numbers is exact in float32, so tensor cores multiply the rows as they are and
add up in float32. The lengths are divided out afterwards.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.losses.kernels.gram import gram

WORTH = 2**32  # multiplications; fewer are done in float32 before a host launches the split
EPS = 1e-12


class UnitRows(NamedTuple):
    """Rows scaled to length one, without gradient.

    `values` `[..., d]`: the unit rows in float32 or float64; or rows of any length in bf16, for
    products on tensor cores. `inverse` `[..., 1]`: 1 / length of rows that were given in half
    precision, in float32; 0 for a zero row.
    """

    values: Tensor
    inverse: Tensor | None = None

    @property
    def scale(self) -> Tensor | None:
        """What `values` must be multiplied by; None for 1."""
        return self.inverse if self.values.dtype == torch.bfloat16 else None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of products."""
        return torch.promote_types(self.values.dtype, torch.float32)

    def at(self, place: Any) -> "UnitRows":
        """Some of the rows."""
        return UnitRows(self.values[place], None if self.inverse is None else self.inverse[place])

    def flat(self) -> "UnitRows":
        """`[K, N, d]` as `[K N, d]`."""
        inverse = None if self.inverse is None else self.inverse.flatten(0, 1)
        return UnitRows(self.values.flatten(0, 1), inverse)

    def unit(self) -> Tensor:
        """The unit rows themselves, in float32 or float64."""
        return self.values if self.scale is None else self.values * self.scale

    def cosines(self, columns: "UnitRows", halved: bool = False) -> Tensor:
        """Products `[m, N]` of these rows `[m, d]` with `columns` `[N, d]`.

        `halved`: where both are the same, a CPU computes half of them (`gram`).
        """
        if self.scale is None or columns.scale is None:
            a, b = self.values, columns.values
            return gram(a, b) if halved else a @ b.T
        products = _tensor_core_product(self.values, columns.values.T)
        return products.mul_(self.scale).mul_(columns.scale.T)

    def combine(self, weights: Tensor, out: Tensor) -> None:
        """Write `weights` `[m, N]` times these unit rows `[N, d]` to `out`; changes `weights`.

        On tensor cores a weight is the sum of two bf16 numbers, which leaves 2^-18 of it at most.
        """
        if self.scale is None:
            torch.matmul(weights, self.values, out=out)
            return
        weights = weights.mul_(self.scale.T)
        parts = weights.new_empty(2, *weights.shape, dtype=torch.bfloat16)
        parts[0].copy_(weights)
        torch.sub(weights, parts[0], out=parts[1])
        products = _tensor_core_product(parts.flatten(0, 1), self.values)
        torch.sum(products.view(2, *out.shape), 0, out=out)


class Compared(NamedTuple):
    """Rows `[k, n, d]` held here that are compared with those of all processes.

    `unit`: scaled to length one, with gradient. `own`: the same for products. `everyone`:
    `[K, N, d]`.
    """

    unit: Tensor
    own: UnitRows
    everyone: UnitRows


def unit_rows_of(everyone: Tensor, held: Tensor) -> UnitRows:
    """Rows `[K, N, d]` in half precision, of which those `held` here are multiplied with all."""
    norm = torch.linalg.vector_norm(everyone, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = torch.threshold(norm, EPS, math.inf).reciprocal_()
    count = held.numel() * inverse.numel()
    # float16's range is too narrow for the parts of a weight.
    if everyone.dtype == torch.bfloat16 and count >= WORTH and _has_tensor_cores(everyone):
        return UnitRows(everyone, inverse)
    return UnitRows(everyone * inverse, inverse)


def scaled_to_one(x: Tensor, inverse: Tensor) -> Tensor:
    """`x` `[..., d]` times `inverse` `[..., 1]`, 1 / length of its rows; in float32."""
    return cast(Tensor, _ScaledToOne.apply(x, inverse))


class _ScaledToOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        unit = x * inverse
        ctx.save_for_backward(unit, inverse)
        ctx.dtype = x.dtype
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse = ctx.saved_tensors
        (grad,) = grads
        # Only what is perpendicular to a row turns it.
        along = (grad * unit).sum(-1, keepdim=True)
        out = torch.empty_like(unit, dtype=ctx.dtype)
        return torch.mul(torch.addcmul(grad, unit, along, value=-1), inverse, out=out), None


def _has_tensor_cores(x: Tensor) -> bool:
    """Whether this tensor's device has tensor cores for bf16."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _tensor_core_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of two matrices in bf16."""
    return torch.mm(a, b, out_dtype=torch.float32)
