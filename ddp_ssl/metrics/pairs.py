"""Metrics of all pairs of rows; one pass in blocks serves mutual information and uniformity."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.comm import ONE_PROCESS, Comm

CHUNK = 1024  # rows at a time: a block of 1024 x 10,000 products takes 80 MB


class PairMeans(NamedTuple):
    """Metrics that follow from means over the M^2 pairs of rows of R and Z; entropies in nats.

    Source: AdaDim A.4 (I(R;Z), at most log M, and Renyi entropies of order 2, in [0, log M]); Wang
    & Isola 2020 (uniformity, in [-8, 0], lower is more uniform; NaN for one row).
    """

    mutual_information: float
    renyi_entropy_r: float
    renyi_entropy_z: float
    uniformity_r: float
    uniformity_z: float


def mutual_information(
    r: Tensor,
    z: Tensor,
    form: Literal["gram", "cov"] = "gram",
    comm: Comm = ONE_PROCESS,
    chunk: int = CHUNK,
) -> float:
    """I(R;Z) in nats of `r` `[M, d_R]` and `z` `[M, d]`, which every process holds whole.

        I(R;Z) = log [ mean(a b) / (mean a * mean b) ]

    a and b are the squared elements of the Gram matrices of R and Z, in float64. `gram`: of the
    l2-normalised rows, in blocks of pairs that the processes share. `cov`: of the l2-normalised
    columns, whose rows the processes share; it needs d_R = d. Not centred. Raises `ValueError` for
    other shapes. Source: AdaDim Eq. 5 and A.4. `losses.mutual_information` has the gradient.
    """
    _check("mutual_information", r, z)
    if form == "gram":
        return pair_means(r, z, comm, chunk).mutual_information
    if r.shape[1] != z.shape[1]:
        raise ValueError(
            f"mutual_information: form cov needs equal widths, got {r.shape[1]} and {z.shape[1]}; "
            "form gram takes any"
        )
    a, b = (_column_gram(x, comm).square() for x in (r, z))
    sums = torch.stack([a.sum(), b.sum(), (a * b).sum()])
    means = (sums / len(a) ** 2).clamp(min=1 / len(a) ** 2)  # as in `pair_means`
    return float(torch.log(means[2]) - torch.log(means[0]) - torch.log(means[1]))


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
    whole; they share the products, of rows or of columns, whichever are fewer. Not centred. Raises
    `ValueError` for anything but a matrix. Source: Giraldo et al. 2015; AdaDim A.4.
    """
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"renyi_entropy: expected a matrix [M, d], got {list(x.shape)}")
    unit, rows = _unit(x), len(x)
    tall = unit if rows >= x.shape[1] else unit.T  # |X X^T|_F = |X^T X|_F
    part = tall[comm.rank :: comm.world_size]
    square = float(comm.sum(part.T @ part).square().sum())
    return -math.log(max(square, 1.0) / rows**2)


def pair_means(r: Tensor, z: Tensor, comm: Comm = ONE_PROCESS, chunk: int = CHUNK) -> PairMeans:
    """The metrics of all pairs of rows of `r` `[M, d_R]` and `z` `[M, d]`, in float64.

    Every process holds both whole; they share the pairs, each of which is taken once. No M x M
    matrix is kept. Not centred. Raises `ValueError` unless both are matrices of equal length.
    """
    _check("pair_means", r, z)
    r, z, rows = _unit(r), _unit(z), len(r)
    sums = r.new_zeros(5)
    for start, stop in _blocks(rows, comm, chunk):
        # The matrix is symmetric: the block on the diagonal counts once, those to its right twice.
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
    # The diagonal is 1, so each mean is at least 1/M. Zero rows alone have a smaller one.
    a, b, joint = (sums[:3] / rows**2).clamp(min=1 / rows**2).tolist()
    potentials_r, potentials_z = (sums[3:] / (rows * (rows - 1))).tolist()
    return PairMeans(
        math.log(joint / (a * b)), -math.log(a), -math.log(b),
        math.log(potentials_r), math.log(potentials_z),
    )  # fmt: skip


def _check(name: str, r: Tensor, z: Tensor) -> None:
    if r.dim() != 2 or z.dim() != 2 or len(r) != len(z) or not r.numel() or not z.numel():
        raise ValueError(
            f"{name}: expected r [M, d_R] and z [M, d], got {list(r.shape)} and {list(z.shape)}"
        )


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.detach().double(), dim=1, eps=1e-12)


def _column_gram(x: Tensor, comm: Comm) -> Tensor:
    """Gram matrix `[d, d]` of the l2-normalised columns; each process multiplies a part of rows."""
    part = x.detach().double()[comm.rank :: comm.world_size]
    part = part / comm.sum(part.square().sum(0)).clamp(min=1e-24).sqrt()
    return comm.sum(part.T @ part)


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
