"""SwAV: Unsupervised Learning by Contrasting Cluster Assignments (Caron et al. 2020)."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import sinkhorn, swav
from ddp_ssl.losses.common import at_least_float32, unit_rows
from ddp_ssl.methods._queue import Queue, QueueConfig
from ddp_ssl.methods.base import Context, Method, Output, Progress


class SwAVConfig(QueueConfig):
    """Predict one view's assignment to prototypes from another view."""

    name: str = "swav"
    prototypes: int = Field(3000, ge=2)
    """Number of prototypes: at least that of classes, and below that of images."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the predictions' cosines."""
    epsilon: float = Field(0.05, gt=0)
    """Smoothness of the assignments."""
    iterations: int = Field(3, ge=1)
    """Rounds of Sinkhorn-Knopp."""
    freeze_epochs: int = Field(2, ge=0)
    """Epochs at the start in which the prototypes are frozen."""
    queue_size: int = Field(3840, ge=0)
    """Embeddings of earlier images that are assigned together with a batch, so that a small batch
    can use all prototypes; 0: none."""
    queue_epoch: int = Field(50, ge=0)
    """Epoch from which the queue is filled; it is used once it is full."""
    variant: Literal["solo"] | None = None
    """null: the official code's. `solo`: solo-learn's. Its prototypes are weight-normed rows of
    free length, which move three to four times as far at the same rate. Its queue is filled from
    the first step and used from `queue_epoch`."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [2048, 128]},
        "data": {"views": [{"count": 2, "recipe": "sym"}]},
        "optim": {"lr": 0.6, "weight_decay": 1e-6},
    }


class SwAV(Method[SwAVConfig]):
    """Backbone, projector, prototypes, and a queue per large view.

    Each large view is assigned to the prototypes over the whole batch (and queue). Every view
    predicts the assignments of the others. The queue is replicated, and the processes share its
    images for the assignment: 3,840 x 128 take 1.9 MB a view in float32.

    Differences from the official code: the sum over a queue is exact at any number of processes
    (there each one has a queue of its own), and the prototypes are scaled to length one after each
    step instead of before the next. `variant: solo` has two more, which docs/methods.md names.
    """

    config_class = SwAVConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        s, width = self.settings, config.model.projector[-1]
        # solo-learn initialises the rows as those of a linear layer; their length is about 0.58.
        rows = (
            nn.Linear(width, s.prototypes, bias=False).weight.detach()
            if s.variant == "solo"
            else unit_rows(torch.randn(s.prototypes, width))
        )
        self.prototypes = nn.Parameter(rows)
        self.queue = Queue(s.queue_size, width, self.num_large) if s.queue_size else None
        self.queued = 0  # number of images appended to the queue
        self.epoch = 0

    def forward(self, batch: Batch) -> Output:
        s = self.settings
        r, z = self.encode(batch.views)
        with torch.autocast(z.device.type, enabled=False):
            unit = unit_rows(at_least_float32(z))
            scores = unit @ self._directions().T  # [k, n, P]
        large = unit[: self.held_large].detach()
        assignments = self.all_views(self._assign(large, scores.detach()))
        loss = self.over_pair_rows(
            lambda x, target: swav(x, target, s.temperature), scores, assignments
        )
        if self.queue is not None:
            self.queue.newest = self.comm.gather(large)
        return Output(loss, {}, r, z)

    def _directions(self) -> Tensor:
        """The prototypes, of length one."""
        solo = self.settings.variant == "solo"
        return unit_rows(self.prototypes) if solo else self.prototypes

    @torch.no_grad()
    def _assign(self, large: Tensor, scores: Tensor) -> Tensor:
        """Assignments `[k, n, P]` of the large views held here, balanced with the queue's."""
        s, images = self.settings, large.shape[1]
        scores = scores[: len(large)]
        waits = s.variant == "solo" and self.epoch < s.queue_epoch
        if self.queue is not None and self.queued >= s.queue_size and not waits:
            part = slice(self.comm.data_rank, None, self.comm.data_shards)
            rows = self.queue.rows[self.comm.views, part]
            scores = torch.cat([scores, rows @ self._directions().T], 1)
        return sinkhorn(scores, s.epsilon, s.iterations, self.comm)[:, :images]

    def before_optimizer(self, progress: Progress) -> None:
        """Freeze the prototypes during the first epochs."""
        if progress.epoch < self.settings.freeze_epochs:
            self.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Scale the prototypes to length one and append the batch to the queue."""
        solo = self.settings.variant == "solo"
        if not solo:
            self.prototypes.copy_(unit_rows(self.prototypes))
        if self.queue is not None and (solo or progress.epoch >= self.settings.queue_epoch):
            self.queued += self.queue.append_newest()

    def after_epoch(self, context: Context) -> None:
        """Note the epoch that begins."""
        self.epoch = context.epoch + 1

    def get_extra_state(self) -> dict[str, Any]:
        """The number of images queued, and the epoch."""
        return {"queued": self.queued, "epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load both from a checkpoint."""
        self.queued = int(state["queued"])
        self.epoch = int(state.get("epoch", 0))  # older checkpoints do not need it
