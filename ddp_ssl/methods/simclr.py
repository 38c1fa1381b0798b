"""SimCLR: A Simple Framework for Contrastive Learning (Chen et al. 2020)."""

from ddp_ssl.config import MethodConfig, Temperature
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import info_nce
from ddp_ssl.methods.base import Method, Output


class SimCLRConfig(MethodConfig):
    """InfoNCE between views; every other image of the global batch is a negative."""

    name: str = "simclr"
    temperature: Temperature = 0.2
    """Temperature of the cosine similarities."""

    recipe = {  # noqa: RUF012 (pydantic reads the annotation from the base)
        "model": {"projector": [4096, 512], "projector_norm": "none"},
        "data": {"views": [{"count": 2, "recipe": "sym"}]},
        "optim": {"lr": 0.3},
    }


class SimCLR(Method[SimCLRConfig]):
    """Backbone, projector and InfoNCE."""

    config_class = SimCLRConfig

    def forward(self, batch: Batch) -> Output:
        r, z = self.encode(batch.views)
        loss = info_nce(z, self.settings.temperature, self.comm)
        return Output(loss, {"nce": loss}, r, z)
