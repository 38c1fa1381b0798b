"""Embeddings for losses, and two losses compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import relative

Loss = Callable[[Tensor], Tensor]


def some(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    x = x * torch.linspace(0.3, 2, shape[-1], dtype=torch.float64)  # not isotropic
    return x.requires_grad_(grad)


def same(ours: Loss, theirs: Loss, z: Tensor) -> None:
    """Equal in value and gradient."""
    z = z.detach().requires_grad_()
    a, b = ours(z), theirs(z)
    assert float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-9)
    (grad_a,), (grad_b,) = torch.autograd.grad(a, z), torch.autograd.grad(b, z)
    assert relative(grad_a, grad_b) < 1e-8
