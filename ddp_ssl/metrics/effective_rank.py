"""Effective rank: how many dimensions the rows of a matrix use."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.metrics.spectrum import Spectrum


def effective_rank(x: Tensor | Spectrum) -> Tensor:
    """Effective rank of `x` `[M, d]`: a float64 scalar in [1, rank], 0 for a zero matrix.

    exp of the entropy of the singular values divided by their sum. Not centred, no epsilon.
    Source: Roy & Vetterli 2007; AdaDim A.3.
    """
    if isinstance(x, Spectrum):
        finite = x.eigenvalues.isfinite().all()
        return torch.where(finite, rank_of_spectrum(x.singular_values), torch.nan)
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"effective_rank: expected a matrix [M, d], got {list(x.shape)}")
    return rank_of_spectrum(torch.linalg.svdvals(x.detach().double()))


def rank_of_spectrum(singular_values: Tensor) -> Tensor:
    """exp(-sum p log p) with p = singular values / their sum; 0 if all are zero."""
    total = singular_values.sum()
    p = singular_values / total.clamp(min=torch.finfo(singular_values.dtype).tiny)
    return torch.where(total > 0, torch.special.entr(p).sum().exp(), torch.zeros_like(total))


def rank_of_gram(gram: Tensor, rank_bound: int) -> Tensor:
    """Effective rank of X from X^T X or X X^T in float64.

    `rank_bound`: min(rows, columns) of X. Only that many eigenvalues can differ from zero; the
    others are rounding, and their square roots would add up.
    """
    eigenvalues = torch.linalg.eigvalsh(gram.double())[-rank_bound:]
    return rank_of_spectrum(eigenvalues.clamp(min=0).sqrt())


def global_effective_rank(
    x: Tensor,
    route: Literal["gather", "gram"] = "gather",
    center: bool = False,
    comm: Comm = ONE_PROCESS,
) -> tuple[float, int]:
    """Effective rank of the rows of all processes, and the largest it can be.

    `x`: `[n, d]`, one view of the images held here (of a view group, its first member counts).
    `gather`: the rows are gathered and rank 0 takes the SVD in float64. `gram`: one all-reduced
    d x d matrix in float64, cheaper for many rows (with fewer rows than columns, the N x N matrix
    of the gathered rows).
    Both end in rank 0's value on every process, the same bits. With `center` the mean row is
    subtracted and the bound is min(N - 1, d).
    """
    with torch.no_grad():
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        images, width = x.shape[0] * comm.data_shards, x.shape[1]
        bound = max(1, min(images - 1 if center else images, width))
        value = 0.0
        if route == "gather" or images < width:
            rows = comm.gather(x[None])[0]
            if comm.rank == 0:
                rows = rows.double()
                rows = rows - rows.mean(0) if center else rows
                rank = (
                    effective_rank(rows)
                    if route == "gather"
                    else rank_of_gram(rows @ rows.T, bound)
                )
                value = float(rank)
        else:
            x = x.double() * (comm.view_rank == 0)
            mean = comm.sum(x.sum(0)) / images
            if center and comm.view_rank == 0:
                x = x - mean
            gram = comm.sum(x.T @ x)
            if comm.rank == 0:
                value = float(rank_of_gram(gram, bound))
        return comm.broadcast(value), bound
