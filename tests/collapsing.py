"""Methods that have lost what keeps them from collapsing, as in code that people write."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses.barlow_twins import pair_correlations
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.methods.barlow_twins import BarlowTwins
from ddp_ssl.methods.base import Context, Output, Progress
from ddp_ssl.methods.byol import BYOL
from ddp_ssl.methods.deepclusterv2 import DeepClusterV2
from ddp_ssl.methods.dino import DINO
from ddp_ssl.methods.mmcr import MMCR
from ddp_ssl.methods.mocov2plus import MoCoV2Plus
from ddp_ssl.methods.mocov3 import MoCoV3
from ddp_ssl.methods.nnclr import NNCLR
from ddp_ssl.methods.simsiam import SimSiam
from ddp_ssl.methods.swav import SwAV


class RewardedRedundancy(BarlowTwins):
    """The off-diagonal term has the wrong sign."""

    def forward(self, batch: Batch) -> Output:
        r, z = self.encode(batch.views)
        on, off = pair_correlations(z, comm=self.comm)
        return Output(0.1 * (on - 0.05 * off), {}, r, z)


class NoPredictor(BYOL):
    """Nothing between the projector and the loss."""

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        self.predictor = nn.Identity()


class OneCluster(DeepClusterV2):
    """All other clusters have become empty."""

    def _cluster(self, context: Context, epoch: int) -> None:
        super()._cluster(context, epoch)
        assert self.assignments is not None
        self.assignments.clamp_(max=0)


class NoCentre(DINO):
    """The teacher is sharpened, but not centred."""

    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        self.center.zero_()


class Minimised(MMCR):
    """The nuclear norm has the wrong sign."""

    def forward(self, batch: Batch) -> Output:
        out = super().forward(batch)
        return Output(-out.loss, {}, out.features, out.embeddings)


class EmptyQueue(MoCoV2Plus):
    """No key enters the queue, so the negatives are random vectors for ever."""

    def after_step(self, progress: Progress) -> None:
        before = self.queue.rows.clone()
        super().after_step(progress)
        self.queue.rows.copy_(before)


class NoNegatives(MoCoV3):
    """The keys are the trained network's own, with their gradient, and there are no negatives."""

    def forward(self, batch: Batch) -> Output:
        r, z, p = self.encode(batch.views, self.with_predictor)
        return Output(self.over_pairs(lambda i, j: apart(p[i], z[j])), {}, r, z)


class NeighboursAlone(NNCLR):
    """Embeddings approach their neighbours, without predictor, and nothing is kept apart."""

    def forward(self, batch: Batch) -> Output:
        out = super().forward(batch)
        z = at_least_float32(out.embeddings)
        nearest = self.queue.rows[0][(F.normalize(z, dim=-1) @ self.queue.rows[0].T).argmax(-1)]
        loss = self.over_pairs(lambda i, j: apart(z[i], nearest[j]))
        return Output(loss + 0 * out.loss, {}, out.features, out.embeddings)


class NoStop(SimSiam):
    """The gradient flows into the targets too."""

    def forward(self, batch: Batch) -> Output:
        r, z, p = self.encode(batch.views, self.with_predictor)
        return Output(self.over_pairs(lambda i, j: apart(p[i], z[j])), {}, r, z)


class NoBalance(SwAV):
    """The assignments are a softmax of the scores, without Sinkhorn-Knopp."""

    def _assign(self, large: Tensor, scores: Tensor) -> Tensor:
        return (scores[: len(large)] / self.settings.epsilon).softmax(-1)


def apart(a: Tensor, b: Tensor) -> Tensor:
    """1 - the mean cosine."""
    return 1 - F.cosine_similarity(at_least_float32(a), at_least_float32(b), dim=-1).mean()
