"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al. 2021)."""

from typing import Literal

from pydantic import Field

from ddp_ssl.config import Strength
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses.barlow_twins import mean_correlations, pair_correlations
from ddp_ssl.methods.base import Method, NeedsVariance, Output


class BarlowTwinsConfig(NeedsVariance):
    """Each feature of one view correlates with itself in the other view, and with no other."""

    name: str = "barlow_twins"
    off_diagonal: Strength | Literal["auto"] = 0.0051
    """Weight of the off-diagonal correlations; `auto`: 3 / width of the embedding, which small
    projectors need (Ghosh et al. 2023)."""
    scale: float | None = Field(None, gt=0)
    """Factor of the loss; none: 0.1 for `pairs`, 1 for `fastssl`. Published runs on W processes
    trained with the gradient divided by W, since autograd does not see their all-reduce: 0.1 / W
    repeats such a run (solo-learn's: 0.05)."""
    multiview: Literal["pairs", "fastssl"] = "pairs"
    """More than two views: the mean over all pairs, or each view against the mean of all. `fastssl`
    also scales rows to length one and standardises over all views, for two views too."""
    route: Literal["auto", "gather", "moments"] = "auto"
    """Correlations from products of all pairs of images (`gather`) or all-reduced (`moments`):
    equal; `auto` takes the cheaper, `gather` where images are fewer than dimensions."""

    recipe = {  # noqa: RUF012
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"lr": 0.3},
    }


class BarlowTwins(Method[BarlowTwinsConfig]):
    """Backbone, projector and the correlations."""

    config_class = BarlowTwinsConfig

    def forward(self, batch: Batch) -> Output:
        s = self.settings
        r, z = self.encode(batch.views)
        weight = 3 / z.shape[-1] if s.off_diagonal == "auto" else s.off_diagonal
        correlations = mean_correlations if s.multiview == "fastssl" else pair_correlations
        on, off = correlations(z, route=s.route, comm=self.comm)
        scale = (1.0 if s.multiview == "fastssl" else 0.1) if s.scale is None else s.scale
        loss = scale * (on + weight * off)
        return Output(loss, {"on_diagonal": on, "off_diagonal": off}, r, z)
