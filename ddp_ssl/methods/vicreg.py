"""VICReg: Variance-Invariance-Covariance Regularization (Bardes, Ponce & LeCun 2022)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.config import Strength
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import VICReg as Terms
from ddp_ssl.losses import vicreg, vicreg_multiview
from ddp_ssl.methods.base import Method, NeedsVariance, Output


class VICRegConfig(NeedsVariance):
    """Pull views together, keep the variance of every dimension, decorrelate the dimensions."""

    name: str = "vicreg"
    invariance: float = Field(25.0, ge=0)
    """Weight of the mean squared distance between views."""
    variance: float = Field(25.0, ge=0)
    """Weight of the hinge on each dimension's standard deviation."""
    covariance: Strength | Literal["auto"] = 1.0
    """Weight of the squared off-diagonal covariances; `auto`: `invariance` times 3 / width of the
    embedding, which small projectors need (Ghosh et al. 2023)."""
    multiview: Literal["pairs", "fastssl"] = "pairs"
    """More than two views: the mean over all pairs, or each view against the mean of the others,
    with fastssl's weights (its variance term is half of that of `pairs`)."""
    average_variance: bool = False
    """`pairs`: average the hinge over views, as the official code, instead of summing two."""
    route: Literal["auto", "gather", "moments"] = "auto"
    """Covariances from products of all pairs of images (`gather`) or all-reduced (`moments`):
    equal; `auto` takes the cheaper, `gather` where images are fewer than dimensions."""

    recipe = {  # noqa: RUF012
        "data": {"views": [{"count": 2, "recipe": "vic"}]},
        "optim": {"lr": 0.3},
    }


def configured_vicreg(s: VICRegConfig, z: Tensor, comm: Comm) -> Terms:
    """The loss with the config's weights."""
    covariance = s.invariance * 3 / z.shape[-1] if s.covariance == "auto" else s.covariance
    weights = (s.invariance, s.variance, covariance)
    if s.multiview == "fastssl":
        return vicreg_multiview(z, *weights, route=s.route, comm=comm)
    return vicreg(z, *weights, average_variance=s.average_variance, route=s.route, comm=comm)


def logged(out: Terms) -> dict[str, Tensor | float]:
    """The three terms under their names in the log."""
    return {
        "vicreg_invariance": out.invariance,
        "vicreg_variance": out.variance,
        "vicreg_covariance": out.covariance,
    }


class VICReg(Method[VICRegConfig]):
    """Backbone, projector and the three terms."""

    config_class = VICRegConfig

    def forward(self, batch: Batch) -> Output:
        r, z = self.encode(batch.views)
        out = configured_vicreg(self.settings, z, self.comm)
        return Output(out.loss, logged(out), r, z)
