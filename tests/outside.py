"""A method that is not in the package."""

from __future__ import annotations

from ddp_ssl.config import MethodConfig
from ddp_ssl.data.batch import Batch
from ddp_ssl.methods.base import Method, Output


class OutsideConfig(MethodConfig):
    """Pull the views together."""

    name: str = "outside"
    strength: float = 1.0
    """Weight of the only term."""


class Outside(Method[OutsideConfig]):
    """Nothing but invariance."""

    config_class = OutsideConfig

    def forward(self, batch: Batch) -> Output:
        r, z = self.encode(batch.views)
        loss = self.settings.strength * (z - z.mean(0)).square().mean()
        return Output(loss, {"invariance": loss}, r, z)


class LargeOnlyConfig(OutsideConfig):
    """The same for a method that small crops would mislead."""

    small_crops = False


class LargeOnly(Outside):
    """Takes views of one size."""

    config_class = LargeOnlyConfig
