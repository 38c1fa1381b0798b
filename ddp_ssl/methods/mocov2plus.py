"""MoCo v2+: Improved Baselines with Momentum Contrastive Learning (Chen et al. 2020), symmetric.

The plus is solo-learn's: both views are queries and both are keys.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, Temperature
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import moco
from ddp_ssl.methods._momentum import MomentumConfig, MomentumMethod
from ddp_ssl.methods._queue import Queue, check_queue_size
from ddp_ssl.methods.base import Output, Progress


class MoCoV2PlusConfig(MomentumConfig):
    """InfoNCE between queries, a momentum network's keys, and a queue of earlier keys."""

    name: str = "mocov2plus"
    final_momentum: float = Field(0.999, ge=0, le=1)
    temperature: Temperature = 0.2
    """Temperature of the cosine similarities."""
    queue_size: int = Field(65536, ge=1)
    """Earlier keys per view, at least a batch; need not be a multiple of it."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [2048, 256], "projector_norm": "none"},
        "data": {"views": [{"count": 2, "recipe": "weak"}]},
        "optim": {"name": "sgd", "lr": 0.3},
        "eval": {"probe_lr": 0.3},
    }

    def check(self, config: Config) -> None:
        """Refuse a queue smaller than a batch."""
        check_queue_size(self.queue_size, config)


class MoCoV2Plus(MomentumMethod[MoCoV2PlusConfig]):
    """Backbone and projector; a momentum copy; a queue of keys for each large view.

    The loss is the mean over all pairs of a query's view and another, large view, whose queue gives
    the negatives. The batch's keys enter the queues after the step. The queues are replicated: two
    of 65,536 x 256 take 128 MiB in float32. Global batch norm replaces the paper's shuffling.
    """

    config_class = MoCoV2PlusConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        width = config.model.projector[-1]
        self.queue = Queue(self.settings.queue_size, width, count=self.num_large)
        self._newest: Tensor | None = None

    def forward(self, batch: Batch) -> Output:
        with torch.no_grad():
            self._newest = self.comm.gather(self.targets(batch.views))
        r, z = self.encode(batch.views)
        mine = self._newest[:, self.comm.rows(z.shape[1])]
        loss = self.over_pairs(
            lambda index, target: moco(
                z[index], mine[target], self.queue.rows[target], self.settings.temperature
            )
        )
        return Output(loss, {"nce": loss}, r, z)

    def after_step(self, progress: Progress) -> None:
        """Move the momentum network and append the keys to their queues."""
        super().after_step(progress)
        assert self._newest is not None
        self.queue.append(self._newest)
        self._newest = None
