"""Matrices whose spectrum is known or decays."""

from __future__ import annotations

import torch
from torch import Tensor


def with_spectrum(sigma: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, len(sigma), dtype=torch.float64, generator=g))
    v, _ = torch.linalg.qr(torch.randn(columns, len(sigma), dtype=torch.float64, generator=g))
    return u * sigma @ v.T


def embeddings(rows: int, columns: int) -> Tensor:
    decay = torch.arange(1, columns + 1, dtype=torch.float64) ** -0.7
    g = torch.Generator().manual_seed(5)
    return torch.randn(rows, columns, dtype=torch.float64, generator=g) * decay + 0.2
