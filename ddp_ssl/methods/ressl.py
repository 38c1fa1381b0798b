"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation (Zheng et al. 2021)."""

import torch
from pydantic import Field

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import ressl
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.methods._momentum import MomentumConfig, MomentumMethod
from ddp_ssl.methods._queue import Queue, QueueConfig
from ddp_ssl.methods.base import Output, Progress


class ReSSLConfig(MomentumConfig, QueueConfig):
    """Have the similarities to earlier embeddings that a momentum network's weak view has."""

    name: str = "ressl"
    query_temperature: float = Field(0.1, gt=0)
    """Temperature of the trained network's similarities."""
    key_temperature: float = Field(0.04, gt=0)
    """Temperature of the momentum network's similarities; a lower one makes them sharper."""
    queue_size: int = Field(65536, ge=1)
    """Earlier embeddings, at least a batch; need not be a multiple of it."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [4096, 256], "projector_norm": "none"},
        "data": {"views": [{"count": 2, "recipe": "ressl"}]},
        "optim": {"name": "sgd", "lr": 0.3},
    }
    small_crops = False


class ReSSL(MomentumMethod[ReSSLConfig]):
    """Backbone and projector; a momentum copy; a queue of its embeddings.

    Views 0, 2, … are strong and give the queries; views 1, 3, … are weak and give the momentum
    network's targets (the augmentation recipe `ressl` makes them so). The loss is the mean over the
    pairs of a strong and a weak view; for two views it is the paper's one direction. View 1's
    momentum embeddings enter the queue after the step.

    As in solo-learn both networks see all views. The trained network's weak views are not in the
    loss, but in batch statistics and the probe.
    """

    config_class = ReSSLConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        self.queue = Queue(self.settings.queue_size, config.model.projector[-1])

    def forward(self, batch: Batch) -> Output:
        s = self.settings
        with torch.no_grad():
            everyone = self.comm.gather(self.targets(batch.views))
        self.queue.newest = everyone[1:2]
        r, z = self.encode(batch.views)
        weak = everyone[1::2, self.comm.rows(z.shape[1])]

        held = range(self.num_views)[self.comm.views]
        # A process may hold only weak views. DDP needs a gradient from it too, if only zero.
        total = 0 * at_least_float32(z).mean()
        for index, view in enumerate(held):
            for key in weak if view % 2 == 0 else ():
                total = total + ressl(
                    z[index], key, self.queue.rows[0], s.query_temperature, s.key_temperature
                )
        strong = len(range(0, self.num_views, 2))
        loss = total * (self.comm.view_shards / (strong * len(weak)))
        return Output(loss, {"relation": loss}, r, z)

    def after_step(self, progress: Progress) -> None:
        """Move the momentum network and append view 1's embeddings to the queue."""
        super().after_step(progress)
        self.queue.append_newest()
