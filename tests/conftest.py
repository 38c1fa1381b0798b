"""Fixtures that are dear: the pool of ranks, a small image folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that form gloo groups of 1 to 4."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's environment leaks into a test, and each test starts from one seed."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
    torch.set_num_threads(2)
