"""BYOL: Bootstrap Your Own Latent (Grill et al. 2020)."""

from pydantic import Field

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import byol
from ddp_ssl.methods._momentum import MomentumConfig, MomentumMethod
from ddp_ssl.methods.base import Output
from ddp_ssl.models import projection_head


class BYOLConfig(MomentumConfig):
    """Predict a momentum network's embedding of another view; no negatives."""

    name: str = "byol"
    predictor_hidden: int = Field(8192, ge=1)
    """Width of the predictor's hidden layer."""

    recipe = {  # noqa: RUF012 (pydantic reads the annotation from the base)
        "model": {"projector": [4096, 256]},
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"lr": 0.5, "weight_decay": 1e-6},
    }


class BYOL(MomentumMethod[BYOLConfig]):
    """Backbone, projector, predictor; a momentum copy of the first two.

    The loss is summed over all pairs of a view and another, large view, as in solo-learn: two terms
    for two views. With more views or multi-crop the momentum network sees only the large ones, and
    every view predicts each large one but itself.
    """

    config_class = BYOLConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        width = config.model.projector[-1]
        self.predictor = projection_head(
            width, [self.settings.predictor_hidden, width], "batch", bias=True
        )

    def forward(self, batch: Batch) -> Output:
        targets = self.all_views(self.targets(batch.views))
        r, z, p = self.encode(batch.views, self.with_predictor)
        mean = self.over_pair_rows(byol, p, targets)
        return Output(mean * self.num_pairs, {"cosine": 1 - mean.detach() / 2}, r, z)
