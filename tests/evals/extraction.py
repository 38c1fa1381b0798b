"""A small set of images and a network that gives their features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.evals.features import Extractor
from ddp_ssl.evals.settings import EvaluateConfig

CPU = torch.device("cpu")
SIZE = 16
FLIPPED = {"scale": [1, 1], "ratio": [1, 1], "jitter_p": 0, "gray_p": 0, "blur_p": 0, "flip_p": 1}
RANDOM = {"scale": [0.3, 1], "blur_p": 0, "solarize_p": 0}


def split_of(count: int) -> Split:
    rng = np.random.default_rng(0)
    return Split.of_array(
        rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8), np.arange(count) % 5
    )


def settings_of(
    view: dict[str, Any],
    cache_mb: float = 1000,
    seed: int = 0,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "run": {"cache_mb": cache_mb, "seed": seed},
            "model": model or {},
            "data": {
                "views": [{"size": SIZE, **view}], "mean": [0.5] * 3, "std": [0.25] * 3,
                "threads": 1, "read_threads": 2, **(data or {}),
            },
            "eval": {"batch_size": 7},
        }
    )  # fmt: skip


class Network(nn.Module):
    """Not linear: the mean of two features is not the feature of the mean image."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * SIZE * SIZE, 6, generator=g) / 30)

    def forward(self, x: Tensor) -> Tensor:
        return (nn.functional.interpolate(x, SIZE).flatten(1) @ self.weight).tanh()


def extractor_of(settings: EvaluateConfig, world: World, **options: Any) -> Extractor:
    return Extractor(Network(), 6, settings, comm_of(world), CPU, **options)
