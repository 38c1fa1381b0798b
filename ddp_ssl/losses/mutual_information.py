"""Mutual information I(R;Z) of representation and embedding, over the global batch."""

from typing import Literal

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, gather_unit_rows, unit_rows
from ddp_ssl.losses.kernels.gram import squared_products


def mutual_information(
    r: Tensor,
    z: Tensor,
    form: Literal["gram", "cov"] = "gram",
    comm: Comm = ONE_PROCESS,
    gathered: Tensor | None = None,
) -> Tensor:
    """Matrix-based Renyi mutual information of order 2, in nats; the full value on every process.

        I(R;Z) = H(A) + H(B) - H(A o B),  H(A) = -log(|A|_F^2 / M^2)
               = log [ mean(a b) / (mean a * mean b) ]

    A and B are the Gram matrices of R and Z, a and b their squared elements, and the means are over
    all M^2 elements. `gram`: M x M, of the l2-normalised rows of all M = K N samples; each process
    computes its own rows, in blocks. `cov`: d x d (M = d), of the l2-normalised columns; it needs
    d_R = d. Not centred.

    `r`: representations `[k, n, d_R]`, `z`: embeddings `[k, n, d]` held here. Returns a scalar in
    float32 or float64, at most log M. `gathered`: `gather_unit_rows(z, ...)` if the caller has it
    already; no gradient flows into it. Raises `ValueError` for other shapes.

    Source: AdaDim Eq. 5 and A.4; Giraldo et al. 2015.
    """
    if r.dim() != 3 or z.dim() != 3 or r.shape[:2] != z.shape[:2]:
        raise ValueError(
            "mutual_information: expected r [K, N, d_R] and z [K, N, d], got "
            f"{list(r.shape)} and {list(z.shape)}"
        )
    if form == "cov" and r.shape[2] != z.shape[2]:
        raise ValueError(
            f"mutual_information: form cov needs equal widths, got {r.shape[2]} and {z.shape[2]}; "
            "form gram takes any"
        )
    with torch.autocast(z.device.type, enabled=False):
        given_r, given_z, r, z = r, z, at_least_float32(r), at_least_float32(z)
        if form == "cov":
            a, b = (_column_gram(x.flatten(0, 1), comm).square() for x in (r, z))
            size = a.shape[0]
            sums = torch.stack([a.sum(), b.sum(), (a * b).sum()])
        else:
            r, z = unit_rows(r), unit_rows(z)
            all_r = gather_unit_rows(given_r, r, comm).flatten(0, 1)
            all_z = gather_unit_rows(given_z, z, comm) if gathered is None else gathered.detach()
            all_z = all_z.to(z.dtype).flatten(0, 1)
            size = all_r.shape[0]
            sums = comm.sum(squared_products(r.flatten(0, 1), z.flatten(0, 1), all_r, all_z))
        # The diagonal is 1, so each mean is at least 1/M. Zero rows alone have a smaller one.
        means = (sums / size**2).clamp(min=1 / size**2)
        return torch.log(means[2]) - torch.log(means[0]) - torch.log(means[1])


def _column_gram(x: Tensor, comm: Comm) -> Tensor:
    """Gram matrix `[d, d]` of the l2-normalised columns of all processes' rows `[m, d]`."""
    norms = comm.sum(x.square().sum(0)).clamp(min=1e-24).sqrt()
    x = x / norms
    return comm.sum(x.T @ x)
