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

WORTH = 2**32  # multiplications; for fewer the launches take longer than products in float32
EPS = 1e-12


class UnitRows(NamedTuple):
    """Rows scaled to length one, without gradient: `values` times `scale`.

    `values` `[..., d]`: in float32 or float64; or in bf16, for products on tensor cores.
    `scale` `[..., 1]`: in float32, beside values in bf16; None stands for 1.
    `inverse` `[..., 1]`: 1 / length of gathered rows in half precision, in float32 and 0 for a zero
    row. None for others.
    """

    values: Tensor
    scale: Tensor | None = None
    inverse: Tensor | None = None

    @property
    def precision(self) -> torch.dtype:
        """That of products: float32 for bf16 too."""
        return torch.promote_types(self.values.dtype, torch.float32)

    def at(self, place: Any) -> "UnitRows":
        """Some of the rows."""
        return UnitRows(self.values[place], None if self.scale is None else self.scale[place])

    def flat(self) -> "UnitRows":
        """`[K, N, d]` as `[K N, d]`."""
        scale = None if self.scale is None else self.scale.flatten(0, 1)
        return UnitRows(self.values.flatten(0, 1), scale)

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

    `unit`: scaled to length one, with gradient. `own`: the same rows without gradient, on tensor
    cores where `everyone`'s are. `everyone`: `[K, N, d]`.
    """

    unit: Tensor
    own: UnitRows
    everyone: UnitRows


def unit_rows_of(everyone: Tensor, multiplications: int) -> UnitRows:
    """Rows `[K, N, d]` in half precision, for products of so many multiplications.

    A bf16 row longer than 1.8e19 counts as a zero row, since its square overflows float32.
    """
    norm = torch.linalg.vector_norm(everyone, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = torch.threshold(norm, EPS, math.inf).reciprocal_()
    # float16's range is too narrow for the parts of a weight.
    half = everyone.dtype == torch.bfloat16
    if half and multiplications >= WORTH and _has_tensor_cores(everyone):
        return UnitRows(everyone, inverse, inverse)
    return UnitRows(everyone * inverse, None, inverse)


def scaled_to_one(x: Tensor, inverse: Tensor, made: Tensor | None = None) -> Tensor:
    """`x` `[..., d]` times `inverse` `[..., 1]`, 1 / length of its rows; in float32.

    `made`: that product, if the caller has it; then the result shares its memory.
    """
    return cast(Tensor, _ScaledToOne.apply(x, inverse, made))


class _ScaledToOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, made: Tensor | None) -> Tensor:
        unit = x * inverse if made is None else made.view_as(made)
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
        return torch.mul(torch.addcmul(grad, unit, along, value=-1), inverse, out=out), None, None


def _has_tensor_cores(x: Tensor) -> bool:
    """Whether this tensor's device has tensor cores for bf16."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _tensor_core_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of two matrices in bf16."""
    return torch.mm(a, b, out_dtype=torch.float32)
