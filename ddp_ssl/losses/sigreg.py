"""Sketched isotropic Gaussian regularisation over the global batch (Balestriero & LeCun 2025)."""

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.losses.kernels.sigreg import distance


def sigreg(
    z: Tensor,
    *,
    seed: int,
    step: int,
    slices: int = 1024,
    t_max: float = 5.0,
    knots: int = 17,
    comm: Comm = ONE_PROCESS,
) -> Tensor:
    """The distance of each view's embeddings from N(0, 1) in random directions.

    With M = `slices` random directions a_m of length one, and phi_km the empirical characteristic
    function of the N numbers a_m . z_ki of view k:

        loss = 1/(K M) sum_km N int |phi_km(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt
        phi_km(t) = 1/N sum_i exp(i t a_m . z_ki)

    The integral (the test of Epps and Pulley) is the trapezoidal rule on `knots` points from
    -`t_max` to `t_max`. It grows with N where the embeddings are not Gaussian; for N(0, I) it is
    sqrt(2 pi) - sqrt(2 pi / 3) = 1.06 in the mean, at any N.

    The directions are a function of `seed` and `step`, the same on all processes of one kind of
    device. Processes exchange the sums over images alone: K M (knots - 1) numbers, at any N.

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process), not normalised. Returns a
    scalar in float32 or float64, the full value on every process. Raises `ValueError` for another
    shape, no direction, or knots that are not an odd number of 3 or more.

    Source: LeJEPA (arXiv:2511.08544), Eq. of SIGReg and Algorithm 1. The authors' later code
    integrates from -3 to 3 with 17 knots on the positive half: `t_max=3, knots=33`.
    """
    if z.dim() != 3:
        raise ValueError(f"sigreg: expected z of shape [K, N, d], got {list(z.shape)}")
    if knots < 3 or knots % 2 == 0:
        raise ValueError(f"sigreg: knots must be an odd number of 3 or more, got {knots}")
    if slices < 1 or t_max <= 0:
        raise ValueError(f"sigreg: needs slices >= 1 and t_max > 0, got {slices} and {t_max}")
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        projected = z @ directions(z.shape[2], slices, seed, step, like=z)
        return distance(projected, t_max / (knots // 2), knots // 2, comm)


def directions(width: int, slices: int, seed: int, step: int, like: Tensor) -> Tensor:
    """Random directions `[width, slices]` of length one; a function of the seed and the step."""
    generator = torch.Generator(like.device).manual_seed((seed * 1_000_003 + step) % 2**63)
    drawn = torch.randn(width, slices, generator=generator, device=like.device, dtype=like.dtype)
    lengths: Tensor = torch.linalg.vector_norm(drawn, dim=0)
    return drawn / lengths
