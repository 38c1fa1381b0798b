"""DALI's operators and torchvision's on the same batch, and how far apart two results are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp_ssl.data.loading import dali
from tests.data.images import picture

IMAGES = np.stack([picture(i, 64, 64) for i in range(6)])
FACTORS = [0.2, 0.6, 0.9, 1.0, 1.3, 1.8]
TURNS = [-0.5, -0.2, -0.05, 0.0, 0.1, 0.3]


def run(operator: Callable[..., Any], images: Any = IMAGES, **given: Any) -> NDArray[Any]:
    """An operator of `pipeline` on a batch of images; per-image numbers are given as arrays."""
    names = list(given)

    def graph() -> Any:
        def source(info: Any) -> Any:
            return [list(images), *(list(np.float32(given[name])) for name in names)]

        x, *numbers = dali.fn.external_source(
            source=source,
            num_outputs=1 + len(names),
            batch_info=True,
            layout=["HWC"] + [""] * len(names),
        )
        return operator(x, *numbers)

    pipe = dali.dali.pipeline_def(graph, enable_conditionals=True)(
        batch_size=len(images), num_threads=1, device_id=None
    )
    (out,) = pipe.run()
    return np.stack([np.asarray(image) for image in out])


def reference(operator: Callable[..., Tensor], *given: Any, images: Any = IMAGES) -> NDArray[Any]:
    """torchvision's operator image by image, on uint8 tensors."""
    results = []
    for i, image in enumerate(images):
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        y = operator(x, *(value[i] for value in given))
        results.append(y.expand(3, -1, -1).permute(1, 2, 0).numpy())
    return np.stack(results)


def off(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Mean |difference|."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).mean())


def distance(a: Any, b: Any) -> float:
    """Kolmogorov-Smirnov: the largest difference of the two cumulative distributions."""
    a, b = np.sort(np.asarray(a)), np.sort(np.asarray(b))
    at = np.concatenate([a, b])
    below = [np.searchsorted(x, at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())
