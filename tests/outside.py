"""A method that is not in the package."""

from __future__ import annotations

from ddp_ssl.config import MethodConfig
from ddp_ssl.data.batch import Batch
from ddp_ssl.methods.base import Method, Output
from ddp_ssl.methods.byol import BYOL, BYOLConfig


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


class OtherBYOLConfig(BYOLConfig):
    """No settings of its own for the embedded default."""


class OtherBYOL(BYOL):
    """BYOL under another name."""

    config_class = OtherBYOLConfig


class OwnBYOLConfig(BYOLConfig):
    """Its own settings in place of BYOL's."""

    embedded = {"optim": {"lr": 0.7}}  # noqa: RUF012


class OwnBYOL(BYOL):
    """BYOL with other settings on the digits."""

    config_class = OwnBYOLConfig


class WithTextConfig(MethodConfig):
    """A key of its own that takes text."""

    name: str = "with_text"
    tag: str | None = None
    """Any text."""


class WithText(Outside):
    """Nothing but invariance."""

    config_class = WithTextConfig  # type: ignore[assignment]
