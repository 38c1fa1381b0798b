"""What the norm costs on a GPU: bytes, operators and collectives of a network's step, counted."""

from __future__ import annotations

import pytest
import torch.distributed
from gpu_path import count

NORMS = 53  # of a ResNet-50

counted = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::_allgather_base_", "Meta"),
    reason="this torch (2.8) cannot gather tensors without values",
)


@counted
@pytest.mark.parametrize("processes", [1, 8, 512])
def test_the_global_norm_moves_what_torchs_kernels_move(processes: int) -> None:
    """ResNet-50, two views of 128 images in bf16: it was 408 GB and 4,756 operators."""
    seen, calls = count("resnet50", "global", 128, processes)
    assert seen.nbytes < 131e9
    assert seen.operators < 1200
    assert calls == 2 * NORMS


def test_the_local_norm_moves_no_more_and_makes_no_call() -> None:
    seen, calls = count("resnet50", "local", 128, 8)
    assert seen.nbytes < 131e9
    assert calls == 0


@counted
def test_against_torchs_synchronised_norm() -> None:
    """Which pools both views, so that it has half as many kernels to launch."""
    ours, _ = count("resnet18", "global", 128, 8)
    theirs, _ = count("resnet18", "sync", 128, 8)
    assert ours.nbytes < 1.06 * theirs.nbytes
    assert ours.operators < 1.3 * theirs.operators
