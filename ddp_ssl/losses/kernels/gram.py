"""Sums over all pairs of images, in blocks of bounded memory; each process takes its own rows.

Every function takes the rows held by this process and, as constants, the rows of all processes. It
returns this process's part of the sum. A pair (i, j) counts in the parts of both processes. Each
summand is symmetric, so the gradient of the whole sum by a row held here needs only what is here:
backward gives that whole gradient and communicates nothing. With `comm.sum` around the parts, value
and gradient are those of the global batch.

Backward computes the blocks again. Only a single block, and on a GPU the first few, are kept.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**22  # pairs in a block
ON_GPU = 4  # times larger blocks on a GPU: each block reads all columns
KEPT = 0  # blocks kept for backward, if there are several
KEPT_ON_GPU = 4  # 256 MiB of float32 for each matrix of products: 512 rows against 131,072
CACHED = 2**18  # elements in a slice that several passes share, so that it stays in a CPU's cache
AT_ONCE = 2**24  # the same on a GPU, where it bounds temporary tensors to 64 MiB
MIRRORED = 128  # rows: smaller products are not worth halving


def blocks(rows: Tensor, columns: int) -> Iterator[slice]:
    """Slices of `rows` `[m, d]`: each has one row or at most `BLOCK` pairs (on a GPU 2^24)."""
    most = BLOCK * (ON_GPU if rows.is_cuda else 1)
    size = max(1, most // max(columns, 1))
    for start in range(0, len(rows), size):
        yield slice(start, min(start + size, len(rows)))


def kept_blocks(rows: Tensor, parts: list[slice]) -> int:
    """Number of blocks that stay in memory for backward."""
    return max(int(len(parts) == 1), KEPT_ON_GPU if rows.is_cuda else KEPT)


def in_cache(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of `x` `[K, n, d]` that stay in the cache for several passes."""
    views, rows, width = x.shape
    size = max(1, (AT_ONCE if x.is_cuda else CACHED) // max(1, views * width))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def add_up(totals: list[Tensor], *terms: Tensor) -> None:
    """Add each term to its total, in place. `totals` is empty at first and then holds the terms."""
    if not totals:
        totals.extend(terms)
        return
    for total, term in zip(totals, terms, strict=True):
        total += term


def gram(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows` `[m, d]` times the transpose of `columns` `[N, d]`, without gradient.

    Where both are the same tensor, a CPU computes half of the product and mirrors it.
    """
    count = len(rows)
    alike = rows.shape == columns.shape and rows.stride() == columns.stride()
    if rows.is_cuda or count < 2 * MIRRORED or not alike:
        return rows @ columns.T
    if rows.data_ptr() != columns.data_ptr():
        return rows @ columns.T
    out = rows.new_empty(count, count)
    size = max(MIRRORED, -(-count // 8))
    for start in range(0, count, size):
        stop = min(start + size, count)
        torch.matmul(rows[start:stop], rows[start:].T, out=out[start:stop, start:])
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a b over two matrices, in blocks of rows.

    `torch.dot` would lose three digits of float32 over millions of elements.
    """
    total = a.new_zeros(())
    for part in blocks(a, a.shape[1]):
        total += (a[part] * b[part]).sum()
    return total


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
        kept: tuple[Tensor | None, Tensor | None] = None, None
        total = a.new_zeros(())
        parts = list(blocks(a, len(all_a)))
        for part in parts:
            gram_a = gram(a[part], all_a)
            gram_b = gram_a if ctx.same else gram(b[part], all_b)
            total += (gram_a * gram_b).sum()
            if len(parts) == 1:
                kept = gram_a, None if ctx.same else gram_b
        ctx.save_for_backward(a, b, all_a, all_b, *kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, all_a, all_b, kept_a, kept_b = ctx.saved_tensors
        grad_a = torch.empty_like(a)
        grad_b = None if ctx.same else torch.empty_like(b)
        for part in blocks(a, len(all_a)):
            gram_a = a[part] @ all_a.T if kept_a is None else kept_a
            if grad_b is None:
                torch.matmul(gram_a, all_a, out=grad_a[part])
            else:
                gram_b = b[part] @ all_b.T if kept_b is None else kept_b
                torch.matmul(gram_b, all_a, out=grad_a[part])
                torch.matmul(gram_a, all_b, out=grad_b[part])
        # A row stands on both sides of a pair: 2. With a = b it stands in both factors too: 4.
        (scale,) = grads
        grad_a *= scale * (4 if grad_b is None else 2)
        return grad_a, None if grad_b is None else grad_b.mul_(2 * scale), None, None


def moment_product(a: Tensor, b: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Part of |A^T B|_F^2 over all images from C = A^T B, summed over processes by `total`.

    `a` `[m, p]`, `b` `[m, q]`: rows held here; `b` may be `a` itself. The part is the product of
    this process's A^T B with C. The parts add up to |C|^2, and backward communicates nothing.
    """
    return cast(Tensor, _MomentProduct.apply(a, b, total))


class _MomentProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        own = gram(a.T, b.T)
        whole = total(own)
        ctx.same = a is b
        ctx.save_for_backward(a, b, whole)
        return inner(own, whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, whole = ctx.saved_tensors
        (scale,) = grads
        if ctx.same:
            return (a @ whole).mul_(4 * scale), None, None
        return (b @ whole.T).mul_(2 * scale), (a @ whole).mul_(2 * scale), None
