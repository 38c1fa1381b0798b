"""SimSiam's loss."""

import torch
from torch import Tensor

from ddp_ssl.losses.common import at_least_float32, check_directions, unit_rows


def simsiam(p: Tensor, z: Tensor) -> Tensor:
    """SimSiam's loss in one direction.

        loss = mean over images of -cos(p, z)

    `p`: predictions `[N, d]`, `z`: embeddings `[N, d]` of another view of the same images; both
    normalised within. No gradient flows into `z`. Returns a scalar in float32 or float64. No image
    sees another one, so the mean over processes is the global loss. Raises `ValueError` for unequal
    shapes.

    Source: SimSiam (Chen & He 2021), Eq. 1 and 3. The paper takes the mean of the two directions,
    as the method does.
    """
    check_directions("simsiam", p=p, z=z)
    with torch.autocast(p.device.type, enabled=False):
        p, z = unit_rows(at_least_float32(p)), unit_rows(at_least_float32(z.detach()))
        return -(p * z).sum(1).mean()
