"""MoCo v2+: Improved Baselines with Momentum Contrastive Learning (Chen et al. 2020), symmetric.

The plus is solo-learn's: both views are queries and both are keys.
"""

import torch
from pydantic import Field

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, Temperature
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import moco
from ddp_ssl.methods._momentum import MomentumConfig, MomentumMethod
from ddp_ssl.methods._queue import Queue, QueueConfig
from ddp_ssl.methods.base import Output, Progress


class MoCoV2PlusConfig(MomentumConfig, QueueConfig):
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


class MoCoV2Plus(MomentumMethod[MoCoV2PlusConfig]):
    """Backbone and projector; a momentum copy; a queue of keys for each large view.

    The loss is the mean over all pairs of a query's view and another, large view, whose queue gives
    the negatives. The batch's keys enter the queues after the step. Global batch norm replaces the
    paper's shuffling.
    """

    config_class = MoCoV2PlusConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        width = config.model.projector[-1]
        self.queue = Queue(self.settings.queue_size, width, count=self.num_large)

    def forward(self, batch: Batch) -> Output:
        with torch.no_grad():
            everyone = self.queue.newest = self.comm.gather(self.targets(batch.views))
        r, z = self.encode(batch.views)
        mine = everyone[:, self.comm.rows(z.shape[1])]
        t, queues = self.settings.temperature, self.queue.rows
        loss = self.over_pairs(lambda i, j: moco(z[i], mine[j], queues[j], t))
        return Output(loss, {"nce": loss}, r, z)

    def after_step(self, progress: Progress) -> None:
        """Move the momentum network and append the keys to their queues."""
        super().after_step(progress)
        self.queue.append_newest()
