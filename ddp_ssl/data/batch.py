"""The batch that loaders give to methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """One process's part of a step.

    `views`: `[n, 3, S, S]` float32 tensors, channels-last, large crops first; under view sharding
    only the views of this process. `ids` `[n]`: indices in the split. `labels` `[n]`: -1 for none.
    """

    views: list[Tensor]
    ids: Tensor
    labels: Tensor
