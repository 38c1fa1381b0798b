"""NNCLR: With a Little Help from My Friends (Dwibedi et al. 2021)."""

import torch
from pydantic import Field

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, Temperature
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import nearest_rows, nnclr
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.methods._queue import Queue, QueueConfig
from ddp_ssl.methods.base import Method, Output, Progress
from ddp_ssl.models import projection_head


class NNCLRConfig(QueueConfig):
    """InfoNCE whose anchors are the views' nearest neighbours among earlier embeddings."""

    name: str = "nnclr"
    temperature: Temperature = 0.2
    """Temperature of the cosine similarities."""
    predictor_hidden: int = Field(4096, ge=1)
    """Width of the predictor's hidden layer."""
    queue_size: int = Field(65536, ge=1)
    """Earlier embeddings in which neighbours are searched, at least a batch; need not be a multiple
    of it."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [2048, 2048, 256]},
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"lr": 0.4, "weight_decay": 1e-5},
    }


class NNCLR(Method[NNCLRConfig]):
    """Backbone, projector, predictor; a queue of embeddings.

    The projector ends in a batch norm. The loss is the mean over all pairs of a view, which
    predicts, and another, large view, whose neighbour is the anchor. The embeddings of view 0 enter
    the queue after the step.
    """

    config_class = NNCLRConfig
    projector_last_norm = "batch"

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        s, width = self.settings, config.model.projector[-1]
        self.predictor = projection_head(width, [s.predictor_hidden, width], "batch", bias=True)
        self.queue = Queue(s.queue_size, width)

    def forward(self, batch: Batch) -> Output:
        r, z, p = self.encode(batch.views, self.with_predictor)
        large = at_least_float32(z[: self.held_large].detach())
        nearest = self.all_views(nearest_rows(large, self.queue.rows[0]))
        with torch.no_grad():
            self.queue.newest = self.comm.gather(large[:1])[:1]
        everyone = self.comm.gather(at_least_float32(p))
        views = range(self.num_views)[self.comm.views]
        t, comm = self.settings.temperature, self.comm
        loss = self.over_pairs(
            lambda i, j: nnclr(nearest[j], p[i], t, comm=comm, gathered=everyone[views[i]])
        )
        return Output(loss, {"nce": loss}, r, z)

    def after_step(self, progress: Progress) -> None:
        """Append the embeddings of view 0 to the queue."""
        self.queue.append_newest()
