"""Sums over all pairs of images, the rows shared among processes, in blocks of bounded memory.

Every function here takes rows held by this process and the rows of all processes as constants, and
returns this process's part of the sum. A pair (i, j) counts in the parts of both processes; since
each summand is symmetric, the gradient of the whole sum with respect to a row held here needs only
what is here. So the backward gives that whole gradient, nothing is sent back to the others, and
with `comm.sum` around the parts value and gradient are the global batch's.

Blocks of at most `BLOCK` pairs are computed again in backward; where one block is all, it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**22


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of `rows`, each with at most `BLOCK` pairs (or one row)."""
    size = max(1, BLOCK // max(columns, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def gram_product(a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor) -> Tensor:
    """Part of |A^T B|_F^2 = sum over images i, j of (a_i . a_j)(b_i . b_j); a scalar.

    `a` `[m, p]`, `b` `[m, q]`: rows held here; `all_a` `[N, p]`, `all_b` `[N, q]`: everyone's,
    without gradient. `b` may be `a` itself.
    """
    return cast(Tensor, _GramProduct.apply(a, b, all_a, all_b))


class _GramProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor) -> Tensor:
        ctx.same = a is b
        ctx.save_for_backward(a, b, all_a, all_b)
        ctx.kept = None
        total = a.new_zeros(())
        parts = list(blocks(len(a), len(all_a)))
        for part in parts:
            of_a = a[part] @ all_a.T
            of_b = of_a if ctx.same else b[part] @ all_b.T
            total += torch.dot(of_a.flatten(), of_b.flatten())
            if len(parts) == 1:
                ctx.kept = of_a, of_b
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, all_a, all_b = ctx.saved_tensors
        grad_a = torch.empty_like(a)
        grad_b = None if ctx.same else torch.empty_like(b)
        for part in blocks(len(a), len(all_a)):
            of_a, of_b = ctx.kept or (a[part] @ all_a.T, None)
            if grad_b is None:
                torch.matmul(of_a, all_a, out=grad_a[part])
            else:
                of_b = b[part] @ all_b.T if of_b is None else of_b
                torch.matmul(of_b, all_a, out=grad_a[part])
                torch.matmul(of_a, all_b, out=grad_b[part])
        # Both roles of a row, and with a = b both factors.
        (scale,) = grads
        grad_a *= scale * (4 if grad_b is None else 2)
        return grad_a, None if grad_b is None else grad_b * (2 * scale), None, None


def squared_products(r: Tensor, z: Tensor, all_r: Tensor, all_z: Tensor) -> Tensor:
    """Parts of the sums over i, j of a, of b and of a b, with a = (r_i . r_j)^2, b = (z_i . z_j)^2.

    `r` `[m, p]`, `z` `[m, q]`: rows held here; `all_r` `[M, p]`, `all_z` `[M, q]`: everyone's,
    without gradient. Returns `[3]`.
    """
    return cast(Tensor, _SquaredProducts.apply(r, z, all_r, all_z))


class _SquaredProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, z: Tensor, all_r: Tensor, all_z: Tensor) -> Tensor:
        ctx.save_for_backward(r, z, all_r, all_z)
        ctx.kept = None
        sums = r.new_zeros(3)
        parts = list(blocks(len(r), len(all_r)))
        for part in parts:
            of_r, of_z = r[part] @ all_r.T, z[part] @ all_z.T
            if len(parts) == 1:
                ctx.kept = of_r, of_z
            a, b = of_r.square(), of_z.square()
            sums += torch.stack([a.sum(), b.sum(), torch.dot(a.flatten(), b.flatten())])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        r, z, all_r, all_z = ctx.saved_tensors
        (grad,) = grads
        need_r, need_z = ctx.needs_input_grad[:2]
        grad_r = torch.empty_like(r) if need_r else None
        grad_z = torch.empty_like(z) if need_z else None
        for part in blocks(len(r), len(all_r)):
            of_r, of_z = ctx.kept or (r[part] @ all_r.T, z[part] @ all_z.T)
            # The sum's derivative by a product s is 2 s (g_a + g_ab b), each pair counted twice.
            if grad_r is not None:
                weight = of_z.square().mul_(4 * grad[2]).add_(4 * grad[0]).mul_(of_r)
                torch.matmul(weight, all_r, out=grad_r[part])
            if grad_z is not None:
                weight = of_r.square().mul_(4 * grad[2]).add_(4 * grad[1]).mul_(of_z)
                torch.matmul(weight, all_z, out=grad_z[part])
        return grad_r, grad_z, None, None
