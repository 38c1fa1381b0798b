"""MoCo v3: Training Self-Supervised Vision Transformers (Chen, Xie & He 2021)."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, Temperature
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import mocov3
from ddp_ssl.methods._momentum import MomentumConfig, MomentumMethod
from ddp_ssl.methods.base import Output
from ddp_ssl.models import projection_head


class MoCoV3Config(MomentumConfig):
    """InfoNCE between predictions and a momentum network's embeddings of the batch; no queue."""

    name: str = "mocov3"
    temperature: Temperature = 0.2
    """Temperature of the cosine similarities."""
    predictor_hidden: int = Field(4096, ge=1)
    """Width of the predictor's hidden layer."""
    predictor_last_norm: bool = False
    """End the predictor in a batch norm without affine, as the paper's code does for ViTs."""
    freeze_patch_embed: bool = False
    """ViTs: do not train the random patch projection, which the paper found to be stable."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [4096, 256], "projector_bias": False},
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"lr": 0.3, "weight_decay": 1e-6},
        "eval": {"probe_lr": 0.3},
    }


class MoCoV3(MomentumMethod[MoCoV3Config]):
    """Backbone, projector, predictor; a momentum copy of the first two.

    The projector ends in a batch norm without weight and bias. The loss is summed over all pairs of
    a view and another, large view: two terms for two views. With more views or multi-crop the keys
    are those of the large views, and every view is a query for each large one but itself.
    """

    config_class = MoCoV3Config
    projector_last_norm = "plain"

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        s, width = self.settings, config.model.projector[-1]
        norm: Literal["plain", "none"] = "plain" if s.predictor_last_norm else "none"
        widths = [s.predictor_hidden, width]
        self.predictor = projection_head(width, widths, "batch", bias=False, last_norm=norm)
        if s.freeze_patch_embed:
            patches = getattr(self.backbone, "patch_embed", None)
            if not isinstance(patches, nn.Module):
                raise ValueError(
                    "method.freeze_patch_embed: only for backbones with a patch projection (ViTs), "
                    f"got model.backbone {config.model.backbone}; false is accepted"
                )
            patches.requires_grad_(False)

    def forward(self, batch: Batch) -> Output:
        with torch.no_grad():
            everyone = self.comm.gather(self.targets(batch.views))
        r, z, p = self.encode(batch.views, self.with_predictor)
        mine = everyone[:, self.comm.rows(p.shape[1])]
        t, comm = self.settings.temperature, self.comm
        mean = self.over_pairs(
            lambda i, j: mocov3(p[i], mine[j], t, comm=comm, gathered=everyone[j])
        )
        return Output(mean * self.num_pairs, {"nce": mean / (2 * t)}, r, z)
