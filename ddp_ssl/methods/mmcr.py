"""MMCR: Learning Efficient Coding of Natural Images with Maximum Manifold Capacity Representations
(Yerxa et al. 2023)."""

from pydantic import Field

from ddp_ssl.config import MethodConfig
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import mmcr
from ddp_ssl.methods.base import Method, Output


class MMCRConfig(MethodConfig):
    """Maximise the nuclear norm of the images' mean embeddings, so that they fill the space."""

    name: str = "mmcr"
    weight: float = Field(0.0, ge=0)
    """Weight of the nuclear norms of each image's own views. It pulls these together more than the
    first term does; 0, as in the published runs, leaves it out."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [8192, 8192, 512]},
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"lr": 0.6, "weight_decay": 1e-6},
    }


class MMCR(Method[MMCRConfig]):
    """Backbone, projector and the nuclear norms.

    On a GPU every step waits for the singular values: `torch.linalg.svdvals` makes the host
    synchronise.
    """

    config_class = MMCRConfig

    def forward(self, batch: Batch) -> Output:
        r, z = self.encode(batch.views)
        return Output(mmcr(z, self.settings.weight, comm=self.comm), {}, r, z)
