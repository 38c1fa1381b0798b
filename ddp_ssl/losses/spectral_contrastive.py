"""The spectral contrastive loss over the global batch."""

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import Route, at_least_float32, check_views
from ddp_ssl.losses.kernels.rows import rows_of


def spectral_contrastive(z: Tensor, *, route: Route = "auto", comm: Comm = ONE_PROCESS) -> Tensor:
    """Spectral contrastive loss, averaged over all pairs of views: the published one at K = 2.

        loss = -2 mean of z_ki . z_mi + mean of (z_ki . z_mj)^2

    Both means are over pairs of views k != m; the first over images i, the second over pairs of
    images i != j. This is an unbiased estimate of the loss over the whole distribution, which is
    |A - F F^T|^2 up to a constant for the normalised adjacency A of the augmentation graph. With
    S_k = Z_k^T Z_k, the squares of all pairs of views and images are |sum_k S_k|^2 - sum_k |S_k|^2,
    in O(K).

    `z`: embeddings `[k, n, d]` held here (`[K, N, d]` in one process), not normalised. Returns a
    scalar in float32 or float64: the full loss on every process. `route`: see
    `losses.common.gathers`. Raises `ValueError` for one view or one image.

    Source: HaoChen et al. 2021, section 3.2 (Ghosh et al. 2024, Eq. 41), and their code,
    jhaochenz96/spectral_contrastive_learning `models/spectral.py`, which also shortens rows to a
    largest length (none here).
    """
    views, images = check_views("spectral_contrastive", z, comm)
    with torch.autocast(z.device.type, enabled=False):
        rows = rows_of(at_least_float32(z), route, comm)
        own = rows.values
        products = own.transpose(0, 1) @ own.permute(1, 2, 0)  # [n, K, K], of each image's views
        products = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
        flat = own.flatten(0, 1)
        squares = rows.squared_product(flat, flat)
        squares = squares - sum(rows.squared_product(x, x) for x in own)
        squares = squares - rows.total(products.square().sum())
        pairs = views * (views - 1) * images
        return squares / (pairs * (images - 1)) - 2 * rows.total(products.sum()) / pairs
