"""Metrics of a spectrum, all from one eigendecomposition."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm

REAL = 1e-12  # a smaller share of the variance is rounding


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of X^T X for a matrix X `[rows, width]`, the largest first.

    `eigenvalues`: float64 `[min(rows, width)]` (of a centred X `[min(rows - 1, width)]`), none
    negative; the other `width - len(eigenvalues)` are zero. Their square roots are X's singular
    values. All NaN if X was not finite.
    """

    eigenvalues: Tensor
    rows: int
    width: int

    @staticmethod
    def of(x: Tensor, center: bool = False, comm: Comm = ONE_PROCESS, owner: int = 0) -> "Spectrum":
        """The spectrum of `x` `[M, d]`, which every process holds whole; the same bits on all.

        The processes share the products; rank `owner` takes the eigenvalues, so that several
        spectra can be spread. The smaller one of X^T X and X X^T is formed, in float64. `center`
        subtracts the mean row. Raises `ValueError` for anything but a matrix.
        """
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(f"spectrum: expected a matrix [M, d], got {list(x.shape)}")
        rows, width = x.shape
        x = x.detach().double()
        x = x - x.mean(0) if center else x
        tall = x if rows >= width else x.T
        part = tall[comm.rank :: comm.world_size]
        gram = comm.sum(part.T @ part)
        size = min(rows - center, width)
        values = gram.new_zeros(size)
        # A Gram matrix that is not finite is so on every process, but only one would raise.
        if not gram.isfinite().all():
            return Spectrum(values.fill_(math.nan), rows, width)
        if size and comm.rank == owner % comm.world_size:
            # Only `size` of them can differ from zero; the others are rounding.
            values = torch.linalg.eigvalsh(gram)[-size:].clamp(min=0).flip(0)
        return Spectrum(comm.sum(values), rows, width)

    @property
    def singular_values(self) -> Tensor:
        """Singular values of X, the largest first."""
        return self.eigenvalues.sqrt()

    @property
    def shares(self) -> Tensor:
        """Eigenvalues divided by their sum; zeros if all are zero."""
        return _normalised(self.eigenvalues)


def rankme(x: Tensor | Spectrum) -> float:
    """RankMe of `x` `[M, d]`: exp(-sum p log p), p = singular values / their sum + 1e-7.

    In [1, min(M, d)] up to the epsilon, 0 for a zero matrix. Not centred.
    Source: Garrido et al. 2023, Eq. 1-2.
    """
    spectrum = _spectrum(x)
    if spectrum.eigenvalues.sum() == 0:
        return 0.0
    p = _normalised(spectrum.singular_values) + 1e-7
    return float(torch.special.entr(p).sum().exp())


def von_neumann_entropy(x: Tensor | Spectrum) -> float:
    """-sum p log p in nats, p = eigenvalues of X^T X / their sum, for `x` `[M, d]`.

    In [0, log min(M, d)]; 0 for a zero matrix. Not centred. Source: AdaDim A.2.
    """
    return float(torch.special.entr(_spectrum(x).shares).sum())


def matrix_entropy(x: Tensor | Spectrum) -> float:
    """-tr(A log A) + tr(A) with A = X^T X / M, for `x` `[M, d]`; 0 log 0 = 0.

    Grows with the scale of x, unlike the others; one more than the von Neumann entropy where the
    rows have length one. Not centred. Source: Zhang et al. 2024, as AdaDim A.3 quotes it.
    """
    spectrum = _spectrum(x)
    a = spectrum.eigenvalues / spectrum.rows
    return float(torch.special.entr(a).sum() + a.sum())


def eigenvalue_count(x: Tensor | Spectrum, threshold: float = 0.01) -> float:
    """The number of eigenvalues of X^T X that exceed `threshold` times their sum, for `x` `[M, d]`.

    A whole number, at most 99 at the default; 0 for a zero matrix, NaN for one that is not finite.
    Not centred. Source: AdaDim, Fig. 3a and A.6.
    """
    shares = _spectrum(x).shares
    return int((shares > threshold).sum()) if shares.isfinite().all() else math.nan


def cumulative_explained_variance(x: Tensor | Spectrum, q: float = 0.3) -> float:
    """Share of the ceil(q d) largest eigenvalues of X^T X in the sum of all d, for `x` `[M, d]`.

    q for a flat spectrum, 1 where few dimensions hold everything; 0 for a zero matrix. Not
    centred. Raises `ValueError` unless 0 < q <= 1. Source: AdaDim, Fig. 3b and A.6.
    """
    if not 0 < q <= 1:
        raise ValueError(f"cumulative_explained_variance: expected 0 < q <= 1, got {q}")
    spectrum = _spectrum(x)
    # 0.3 * 10 is a little more than 3 in floating point, and there are 3 to take.
    return float(spectrum.shares[: math.ceil(q * spectrum.width - 1e-9)].sum())


def alpha_req(x: Tensor | Spectrum, first: int = 4, last: int = 100) -> tuple[float, float]:
    """Exponent a of the decay j^-a of the covariance's eigenvalues, and the fit's R^2.

    `x`: `[M, d]`, which is centred here, or the `Spectrum` of a centred matrix. A line through the
    logarithm of eigenvalue / sum over log j, for j in `first`..`last`, counted from 1 (shortened to
    the numerical rank), least squares weighted by 1 / j, and so is R^2 (1 for a perfect fit).
    Raises `ValueError` with fewer than three such eigenvalues.
    Source: Agrawal et al. 2022 (alpha-ReQ), whose code fits `arange(3, 100)` counted from 0;
    Stringer et al. 2019 for the weights.
    """
    shares = (x if isinstance(x, Spectrum) else Spectrum.of(x, center=True)).shares
    rank = int((shares > REAL).sum())
    last = min(last, rank)
    if last - first < 2:
        raise ValueError(
            f"alpha_req: the fit from eigenvalue {first} on needs {first + 2} that are not zero, "
            f"got {rank}"
        )
    j = torch.arange(first, last + 1, dtype=shares.dtype, device=shares.device)
    weights = 1 / j / (1 / j).sum()
    u, v = j.log(), shares[first - 1 : last].log()
    u, v = u - (weights * u).sum(), v - (weights * v).sum()
    slope = (weights * u * v).sum() / (weights * u * u).sum()
    rest, total = (weights * (v - slope * u) ** 2).sum(), (weights * v * v).sum()
    # A flat spectrum has nothing to explain, so the fit is perfect.
    return -float(slope), 1 - float(rest / total) if total > 1e-24 else 1.0


def _spectrum(x: Tensor | Spectrum) -> Spectrum:
    return x if isinstance(x, Spectrum) else Spectrum.of(x)


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
