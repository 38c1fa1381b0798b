"""Sums over all pairs of samples for the mutual information, in blocks."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddp_ssl.losses.kernels.gram import blocks, kept_blocks
from ddp_ssl.losses.kernels.unit_rows import Compared, UnitRows


def squared_products(r: Compared, z: Compared) -> Tensor:
    """Parts of the sums over i, j of a, of b and of a b, with a = (r_i . r_j)^2, b = (z_i . z_j)^2.

    The products are those of unit rows: `r` of width p and `z` of width q. Returns `[3]`.
    """
    rows = r.unit.flatten(0, 1), z.unit.flatten(0, 1)
    return cast(Tensor, _SquaredProducts.apply(*rows, r, z))


class _SquaredProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit_r: Tensor, unit_z: Tensor, r: Compared, z: Compared) -> Tensor:
        own_r, own_z = r.own.flat(), z.own.flat()
        all_r, all_z = r.everyone.flat(), z.everyone.flat()
        kept: list[Tensor] = []
        sums = unit_r.new_zeros(3)
        parts = list(blocks(unit_r, len(all_r.values)))
        for index, part in enumerate(parts):
            gram_r = own_r.at(part).cosines(all_r, halved=True)
            gram_z = own_z.at(part).cosines(all_z, halved=True)
            if index < kept_blocks(unit_r, parts):
                kept += [gram_r, gram_z]
            a, b = gram_r.square(), gram_z.square()
            sums += torch.stack([a.sum(), b.sum(), a.mul_(b).sum()])
        rows = own_r, own_z, all_r, all_z
        ctx.save_for_backward(*(t for x in rows for t in (x.values, x.scale)), *kept)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        own_r, own_z, all_r, all_z = (UnitRows(*saved[i : i + 2]) for i in range(0, 8, 2))
        kept = saved[8:]
        (grad,) = grads
        need_r, need_z = ctx.needs_input_grad[:2]
        grad_r = grad.new_empty(own_r.values.shape, dtype=own_r.precision) if need_r else None
        grad_z = grad.new_empty(own_z.values.shape, dtype=own_z.precision) if need_z else None
        for index, part in enumerate(blocks(own_r.values, len(all_r.values))):
            gram_r, gram_z = kept[2 * index : 2 * index + 2] or (
                own_r.at(part).cosines(all_r),
                own_z.at(part).cosines(all_z),
            )
            # The sum's derivative by a product s is 2 s (g_a + g_ab b); each pair counts twice.
            if grad_r is not None:
                weight = gram_z.square().mul_(4 * grad[2]).add_(4 * grad[0]).mul_(gram_r)
                all_r.combine(weight, out=grad_r[part])
            if grad_z is not None:
                weight = gram_r.square().mul_(4 * grad[2]).add_(4 * grad[1]).mul_(gram_z)
                all_z.combine(weight, out=grad_z[part])
        return grad_r, grad_z, None, None
