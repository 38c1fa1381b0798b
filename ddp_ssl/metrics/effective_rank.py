"""Effective rank: how many dimensions the rows of a matrix use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

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


def global_effective_rank(
    x: Tensor, route: Route = "auto", center: bool = False, comm: Comm = ONE_PROCESS
) -> tuple[float, int]:
    """Effective rank of the rows of all processes, and the largest it can be.

    `x`: `[n, d]`, one view of the images held here (of a view group, its first member counts). See
    `global_effective_ranks`, of which this is one batch.
    """
    (value,), bound = global_effective_ranks([x], route, center, comm)
    return value, bound


def global_effective_ranks(
    batches: Iterable[Tensor],
    route: Route = "auto",
    center: bool = False,
    comm: Comm = ONE_PROCESS,
) -> tuple[list[float], int]:
    """Effective rank of each global batch, and the largest it can be; the same bits everywhere.

    `batches`: of each the rows held here, `[n, d]`, all of one shape. `gather`: the rows are
    gathered and decomposed (SVD in float64). `gram`: one all-reduced d x d matrix in float64,
    cheaper for many rows (with fewer rows than columns, the N x N matrix of the gathered rows).
    `auto`: `gather` up to N d = 2^20, where it takes a fraction of a second. The two differ by
    1e-11 of the value; where the rows span a few dimensions only, by up to 1e-4 at d = 2,048.

    Batch i is decomposed on rank i mod W, so that W batches take the time of one. With `center`
    the mean row is subtracted and the bound is min(N - 1, d).
    """
    values: list[float] = []
    bound, count = 1, 0
    mine: Matrix | None = None  # this process's of this round

    def decomposed() -> list[float]:
        return comm.numbers(0.0 if mine is None else float(mine.effective_rank()))[:count]

    for matrix in matrices(batches, route, center, comm):
        if count == comm.world_size:
            values += decomposed()
            count, mine = 0, None
        mine, bound = matrix if count == comm.rank else mine, matrix.bound
        count += 1
    values += decomposed()
    return values, bound


def matrices(
    batches: Iterable[Tensor],
    route: Route = "auto",
    center: bool = False,
    comm: Comm = ONE_PROCESS,
) -> Iterator[Matrix]:
    """What `global_effective_ranks` decomposes of each batch, on every process."""
    for x in batches:
        images, width = x.shape[0] * comm.data_shards, x.shape[1]
        bound = max(1, min(images - 1 if center else images, width))
        if route == "auto":
            route = "gather" if images * width <= GATHERED else "gram"
        with torch.no_grad():
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            if route == "gather" or images < width:
                values, kind = comm.gather(x[None])[0], "pairs" if route == "gram" else "rows"
            else:
                values, kind = _gram(x, center, images, comm), "gram"
        yield Matrix(values, cast(Kind, kind), bound, center)


@dataclass(frozen=True)
class Matrix:
    """A global batch, ready to be decomposed without the other processes.

    `values`: its rows `[N, d]`, decomposed by their SVD (`rows`) or through their N x N products
    (`pairs`), or X^T X `[d, d]` (`gram`). `bound`: the largest effective rank it can have.
    """

    values: Tensor
    kind: Kind
    bound: int
    center: bool

    def effective_rank(self) -> Tensor:
        """A float64 scalar."""
        with torch.no_grad():
            if self.kind == "gram":
                return rank_of_gram(self.values, self.bound)
            rows = self.values.double()
            rows = rows - rows.mean(0) if self.center else rows
            if self.kind == "pairs":
                return rank_of_gram(rows @ rows.T, self.bound)
            return effective_rank(rows)

    def on_cpu(self) -> Matrix:
        """The same in host memory."""
        return replace(self, values=self.values.cpu())


def _gram(x: Tensor, center: bool, images: int, comm: Comm) -> Tensor:
    """X^T X `[d, d]` in float64 of the rows of all processes, from those held here `[n, d]`."""
    x = x.double() * (comm.view_rank == 0)
    if center:
        mean = comm.sum(x.sum(0)) / images
        x = x - mean * (comm.view_rank == 0)
    return comm.sum(x.T @ x)
