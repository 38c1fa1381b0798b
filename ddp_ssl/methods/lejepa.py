"""LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics
(Balestriero & LeCun 2025)."""

from typing import Any

from pydantic import Field, field_validator

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, MethodConfig
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import sigreg
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.methods.base import Method, Output, Progress


class LeJEPAConfig(MethodConfig):
    """Predict the mean of the large views, and push embeddings to an isotropic Gaussian."""

    name: str = "lejepa"
    sigreg: float = Field(0.05, ge=0, le=1)
    """Weight λ of the Gaussian test; 1 - λ is that of the prediction. The test grows with the
    global batch, so another batch needs another λ."""
    slices: int = Field(1024, ge=1, le=2**17)
    """Random directions that the embeddings are tested in; each step has its own."""
    t_max: float = Field(5.0, gt=0, le=100)
    """The characteristic function is compared from -t_max to t_max; the authors' later code: 3."""
    knots: int = Field(17, ge=3, le=1025)
    """Points of that comparison, an odd number; the authors' later code: 33."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [2048, 2048, 64]},
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.05},
    }

    @field_validator("knots")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"an odd number would be accepted, got {value}")
        return value


class LeJEPA(Method[LeJEPAConfig]):
    """Backbone, projector, the prediction and the test. No teacher, no stopped gradient."""

    config_class = LeJEPAConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        self.seed, self.step = config.run.seed, 0

    def forward(self, batch: Batch) -> Output:
        s = self.settings
        r, embedded = self.encode(batch.views)
        z = at_least_float32(embedded)
        target = self.all_views(z)[: self.num_large].mean(0)
        prediction = (z - target).square().mean()
        gaussian = sigreg(
            z, seed=self.seed, step=self.step, slices=s.slices, t_max=s.t_max, knots=s.knots,
            comm=self.comm,
        )  # fmt: skip
        loss = (1 - s.sigreg) * prediction + s.sigreg * gaussian
        return Output(loss, {"prediction": prediction, "sigreg": gaussian}, r, embedded)

    def after_step(self, progress: Progress) -> None:
        """Count the step, which the directions depend on."""
        self.step = progress.step + 1

    def get_extra_state(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the step."""
        self.step = int(state["step"])
