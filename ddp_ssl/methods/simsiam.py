"""SimSiam: Exploring Simple Siamese Representation Learning (Chen & He 2021)."""

from typing import Any

from pydantic import Field

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, MethodConfig
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import simsiam
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.methods.base import Method, Output, trainable
from ddp_ssl.models import projection_head


class SimSiamConfig(MethodConfig):
    """Predict the network's own embedding of another view, without gradient into it."""

    name: str = "simsiam"
    predictor_hidden: int = Field(512, ge=1)
    """Width of the predictor's hidden layer, a bottleneck."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [2048, 2048, 2048], "projector_bias": False},
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"name": "sgd", "lr": 0.5, "weight_decay": 1e-5},
    }


class SimSiam(Method[SimSiamConfig]):
    """Backbone, projector, predictor.

    The projector ends in a batch norm without weight and bias. The predictor's learning rate is
    constant: the peak, without warm-up. The loss is the mean over all pairs of a view and another,
    large view. With multi-crop every view predicts each large one but itself; only large views are
    targets.
    """

    config_class = SimSiamConfig
    projector_last_norm = "plain"

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        width = config.model.projector[-1]
        self.predictor = projection_head(
            width, [self.settings.predictor_hidden, width], "batch", bias=True
        )

    def forward(self, batch: Batch) -> Output:
        r, z, p = self.encode(batch.views, self.with_predictor)
        targets = self.all_views(at_least_float32(z[: self.held_large].detach()))
        loss = self.over_pair_rows(simsiam, p, targets)
        return Output(loss, {"cosine": -loss.detach()}, r, z)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for the network, and one for the predictor at a constant rate."""
        network = [(n, p) for n, p in trainable(self) if not n.startswith("predictor.")]
        predictor = {"params": trainable(self.predictor, "predictor."), "schedule": False}
        return [{"name": "network", "params": network}, {"name": "predictor", **predictor}]
