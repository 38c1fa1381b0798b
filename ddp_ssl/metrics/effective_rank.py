"""Effective rank: the number of dimensions that the rows of a matrix use."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.metrics.spectrum import Spectrum

Route = Literal["auto", "gather", "gram"]
Kind = Literal["rows", "pairs", "gram"]
GATHERED = 2**20  # elements: 512 rows of 2,048


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


@dataclass(frozen=True)
class Matrix:
    """A global batch that one process can decompose alone.

    `values`: its rows `[N, d]`, decomposed by their SVD (`rows`) or through their N x N products
    (`pairs`), or X^T X `[d, d]` (`gram`). `bound`: the largest effective rank it can have,
    min(N, d), or min(N - 1, d) if the mean row is to be subtracted (`center`).
    """

    values: Tensor
    kind: Kind
    bound: int
    center: bool

    def effective_rank(self) -> float:
        """The effective rank, from a decomposition in float64."""
        with torch.no_grad():
            if self.kind == "gram":
                return float(rank_of_gram(self.values, self.bound))
            rows = self.values.double()
            rows = rows - rows.mean(0) if self.center else rows
            if self.kind == "pairs":
                return float(rank_of_gram(rows @ rows.T, self.bound))
            return float(effective_rank(rows))


def global_matrix(
    x: Tensor, route: Route = "auto", center: bool = False, comm: Comm = ONE_PROCESS
) -> Matrix:
    """The matrix whose decomposition gives the effective rank of a global batch.

    `x`: `[n, d]`, one view of the images held here (of a view group, the first member's counts).
    `gather`: the rows of all processes. `gram`: their X^T X in float64, all-reduced, which is
    cheaper for many rows (with fewer rows than columns, the rows). `auto`: `gather` up to
    N d = 2^20, where the SVD takes a fraction of a second. The two differ by 1e-11 of the value;
    where the rows span a few dimensions only, by up to 1e-4 at d = 2,048. `center` subtracts the
    mean row. A collective call; every process gets the same bits.
    """
    images, width = x.shape[0] * comm.data_shards, x.shape[1]
    bound = max(1, min(images - 1 if center else images, width))
    if route == "auto":
        route = "gather" if images * width <= GATHERED else "gram"
    with torch.no_grad():
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if route == "gram" and images >= width:
            return Matrix(_gram(x, center, images, comm), "gram", bound, center)
        kind: Kind = "pairs" if route == "gram" else "rows"
        return Matrix(comm.gather(x[None])[0], kind, bound, center)


def _gram(x: Tensor, center: bool, images: int, comm: Comm) -> Tensor:
    """X^T X `[d, d]` in float64 of the rows of all processes, from those held here `[n, d]`."""
    x = x.double() * (comm.view_rank == 0)
    if center:
        mean = comm.sum(x.sum(0)) / images
        x = x - mean * (comm.view_rank == 0)
    return comm.sum(x.T @ x)
