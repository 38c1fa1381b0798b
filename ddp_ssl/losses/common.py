"""What several losses share."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:
    """The last dimension scaled to length one; a zero row stays zero, with gradient zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > eps, x / norm.clamp(min=eps), torch.zeros_like(x))
