"""Metrics of all pairs of rows, in blocks: one pass serves mutual information and uniformity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.mutual_information import mutual_information as of_batch

CHUNK = 1024  # rows at a time: a block of 1024 x 10,000 products takes 80 MB


@dataclass(frozen=True)
class PairMeans:
    """Means over the M^2 pairs of rows of R and Z, from which the pair metrics follow.

    `r`, `z`: of the squared cosines; `joint`: of their product; `potential_*`: of
    exp(-2 |u_i - u_j|^2) over i != j, with u the rows scaled to length one (NaN for one row).
    """

    r: float
    z: float
    joint: float
    potential_r: float
    potential_z: float

    @property
    def mutual_information(self) -> float:
        """I(R;Z) in nats, at most log M. Source: AdaDim A.4."""
        return math.log(self.joint / (self.r * self.z))

    @property
    def renyi_entropy_r(self) -> float:
        """Renyi entropy of order 2 of R, in nats, in [0, log M]."""
        return -math.log(self.r)

    @property
    def renyi_entropy_z(self) -> float:
        """Renyi entropy of order 2 of Z, in nats, in [0, log M]."""
        return -math.log(self.z)

    @property
    def uniformity_r(self) -> float:
        """Uniformity of R, in [-8, 0]; lower is more uniform. Source: Wang & Isola 2020."""
        return math.log(self.potential_r)

    @property
    def uniformity_z(self) -> float:
        """Uniformity of Z, in [-8, 0]; lower is more uniform. Source: Wang & Isola 2020."""
        return math.log(self.potential_z)


def pair_means(r: Tensor, z: Tensor, comm: Comm = ONE_PROCESS, chunk: int = CHUNK) -> PairMeans:
    """What all pairs of rows of `r` `[M, d_R]` and `z` `[M, d]` say, in float64.

    Every process holds both whole; they share the pairs, each of which is taken once. No M x M
    matrix is kept. Not centred. Raises `ValueError` unless both are matrices of equal length.
    """
    _check("pair_means", r, z)
    r, z, rows = _unit(r), _unit(z), len(r)
    sums = r.new_zeros(5)
    for start, stop in _blocks(rows, comm, chunk):
        # Of a symmetric matrix: the block on the diagonal, and twice what is right of it.
        weights = torch.full((rows - start,), 2.0, dtype=r.dtype, device=r.device)
        weights[: stop - start] = 1
        cosines = [x[start:stop] @ x[start:].T for x in (r, z)]
        potentials = [
            _potential(c, x[start:stop], x[start:]) for c, x in zip(cosines, (r, z), strict=True)
        ]
        a, b = (c.square_() for c in cosines)
        parts = [a.sum(0), b.sum(0), (a * b).sum(0), *(p.sum(0) for p in potentials)]
        sums += torch.stack(parts) @ weights
    sums = comm.sum(sums)
    # A unit diagonal keeps each mean at 1/M or more; only zero rows could make it zero.
    a, b, joint = (sums[:3] / rows**2).clamp(min=1 / rows**2).tolist()
    return PairMeans(a, b, joint, *(sums[3:] / (rows * (rows - 1))).tolist())


def mutual_information(
    r: Tensor,
    z: Tensor,
    form: Literal["gram", "cov"] = "gram",
    comm: Comm = ONE_PROCESS,
    chunk: int = CHUNK,
) -> float:
    """I(R;Z) in nats of `r` `[M, d_R]` and `z` `[M, d]`, which every process holds whole.

    The estimator of `losses.mutual_information`, in float64. `gram`: over all pairs of rows, in
    blocks that the processes share. `cov`: over all pairs of columns (shared by rows), which needs
    d_R = d. Not centred. Raises `ValueError` for other shapes. Source: AdaDim Eq. 5 and A.4.
    """
    _check("mutual_information", r, z)
    if form == "cov":
        r, z = (x.detach().double()[comm.rank :: comm.world_size] for x in (r, z))
        return float(of_batch(r[None], z[None], "cov", comm))
    return pair_means(r, z, comm, chunk).mutual_information


def uniformity(x: Tensor, comm: Comm = ONE_PROCESS, chunk: int = CHUNK) -> float:
    """log of the mean of exp(-2 |u_i - u_j|^2) over the pairs i < j of rows of `x` `[M, d]`.

    u are the rows scaled to length one. In [-8, 0]: 0 if all are equal, lower is more uniform,
    -4 in the limit of many dimensions. Every process holds `x` whole; they share the pairs. Not
    centred. Raises `ValueError` unless there are two rows or more. Source: Wang & Isola 2020.
    """
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"uniformity: expected two rows or more [M, d], got {list(x.shape)}")
    x = _unit(x)
    total = x.new_zeros(())
    for start, stop in _blocks(len(x), comm, chunk):
        potential = _potential(x[start:stop] @ x[start:].T, x[start:stop], x[start:])
        total += 2 * potential.sum() - potential[:, : stop - start].sum()
    return math.log(float(comm.sum(total)) / (len(x) * (len(x) - 1)))


def renyi_entropy(x: Tensor, comm: Comm = ONE_PROCESS) -> float:
    """-log(|A|_F^2 / M^2) in nats, A the Gram matrix of the l2-normalised rows of `x` `[M, d]`.

    The matrix-based Renyi entropy of order 2: in [0, log min(M, d)]. Every process holds `x`
    whole; they share the products, of rows or of columns, whichever are fewer. Not centred.
    Source: Giraldo et al. 2015; AdaDim A.4.
    """
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"renyi_entropy: expected a matrix [M, d], got {list(x.shape)}")
    unit, rows = _unit(x), len(x)
    tall = unit if rows >= x.shape[1] else unit.T  # |X X^T|_F = |X^T X|_F
    part = tall[comm.rank :: comm.world_size]
    square = float(comm.sum(part.T @ part).square().sum())
    return -math.log(max(square, 1.0) / rows**2)


def _check(name: str, r: Tensor, z: Tensor) -> None:
    if r.dim() != 2 or z.dim() != 2 or len(r) != len(z) or not r.numel() or not z.numel():
        raise ValueError(
            f"{name}: expected r [M, d_R] and z [M, d], got {list(r.shape)} and {list(z.shape)}"
        )


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.detach().double(), dim=1, eps=1e-12)


def _potential(cosines: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """exp(-2 |u_i - u_j|^2) of unit (or zero) rows; 0 for a row with itself, at the diagonal."""
    squares = left.square().sum(1)[:, None] + right.square().sum(1)
    potential = squares.sub_(cosines, alpha=2).clamp_(min=0).mul_(-2).exp_()
    potential.diagonal().zero_()
    return potential


def _blocks(rows: int, comm: Comm, chunk: int) -> Iterator[tuple[int, int]]:
    """This process's blocks of rows: long ones and short ones, so that all have equal work."""
    size, turn = min(chunk, -(-rows // (2 * comm.world_size))), 2 * comm.world_size
    for number, start in enumerate(range(0, rows, size)):
        if number % turn in (comm.rank, turn - 1 - comm.rank):
            yield start, min(start + size, rows)
