"""Mutual information I(R;Z) of representation and embedding, over the global batch."""

from typing import Literal

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, compared
from ddp_ssl.losses.kernels.mutual_information import squared_products
from ddp_ssl.losses.kernels.unit_rows import UnitRows


def mutual_information(
    r: Tensor,
    z: Tensor,
    form: Literal["gram", "cov"] = "gram",
    comm: Comm = ONE_PROCESS,
    gathered: UnitRows | None = None,
) -> Tensor:
    """Matrix-based Renyi mutual information of order 2, in nats; the full value on every process.

        I(R;Z) = H(A) + H(B) - H(A o B),  H(A) = -log(|A|_F^2 / M^2)
               = log [ mean(a b) / (mean a * mean b) ]

    A and B are the Gram matrices of R and Z, a and b their squared elements, and the means are over
    all M^2 elements. `gram`: M x M, of the l2-normalised rows of all M = K N samples; each process
    computes its own rows, in blocks. `cov`: d x d (M = d), of the l2-normalised columns; it needs
    d_R = d. Not centred.

    `r`: representations `[k, n, d_R]`, `z`: embeddings `[k, n, d]` held here. Returns a scalar in
    float32 or float64, at most log M. `gathered`: `gather_unit_rows(z, comm)` if the caller has it
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
        if form == "cov":
            a, b = (_column_gram(at_least_float32(x), comm).square() for x in (r, z))
            size = a.shape[0]
            sums = torch.stack([a.sum(), b.sum(), (a * b).sum()])
        else:
            wider = torch.promote_types(r.dtype, z.dtype)
            dtype = torch.promote_types(wider, torch.float32)
            pairs = compared(r, comm, None, dtype), compared(z, comm, gathered, dtype)
            size = pairs[0].everyone.values.shape[:2].numel()
            sums = comm.sum(squared_products(*pairs))
        # The diagonal is 1, so each mean is at least 1/M. Zero rows alone have a smaller one.
        means = (sums / size**2).clamp(min=1 / size**2)
        return torch.log(means[2]) - torch.log(means[0]) - torch.log(means[1])


def _column_gram(x: Tensor, comm: Comm) -> Tensor:
    """Gram matrix `[d, d]` of the l2-normalised columns of all processes' rows `[k, n, d]`."""
    x = x.flatten(0, 1)
    norms = comm.sum(x.square().sum(0)).clamp(min=1e-24).sqrt()
    x = x / norms
    return comm.sum(x.T @ x)
