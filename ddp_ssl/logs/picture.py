"""A picture of a batch's views: one row per view, one column per image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

IMAGES, CELL = 8, 96


def view_grid(
    views: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.uint8]:
    """The first `IMAGES` of each view `[n, C, S, S]`, un-normalised, as `[H, W, 3]` uint8.

    Small views are enlarged to `CELL` pixels without smoothing, so that the picture shows
    the network's input.
    """
    rows = []
    for view in views:
        part = view[:IMAGES].float().cpu()
        part = part * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
        part = F.interpolate(as_rgb(part), size=(CELL, CELL), mode="nearest")
        part = F.pad(part, (1, 1, 1, 1), value=1.0)
        rows.append(torch.cat(list(part), dim=2))
    grid = torch.cat(rows, dim=1).clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(grid.permute(1, 2, 0).numpy())


def as_rgb(images: Tensor) -> Tensor:
    """`[n, 3, H, W]`: the first three of the channels, or the first one three times."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
