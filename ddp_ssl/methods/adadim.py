"""AdaDim: VICReg and InfoNCE, balanced by the effective rank of the embeddings.

Kokilepersaud, Prabhushankar & AlRegib 2025. L = alpha NCE + (1 - alpha) VICReg + beta I(R;Z), where
alpha is the effective rank of the embeddings divided by the largest it can be, measured over the
global batch every `alpha_every` epochs. A collapsed embedding is decorrelated; one that already
fills its space is made uniform.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, Temperature
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import info_nce, mutual_information
from ddp_ssl.losses.common import gather_unit_rows
from ddp_ssl.methods._alpha import Alpha, AlphaConfig
from ddp_ssl.methods.base import Context, Method, Output
from ddp_ssl.methods.vicreg import VICRegConfig, configured_vicreg, logged


class AdaDimConfig(AlphaConfig, VICRegConfig):
    """The balance of decorrelation and uniformity."""

    name: str = "adadim"
    temperature: Temperature = 0.1
    """Temperature of InfoNCE's cosine similarities."""
    beta: Literal["off", "fixed", "adaptive"] = "adaptive"
    """Weight of the mutual information term: none, `beta_scale`, or `beta_scale` times alpha."""
    beta_scale: float = 1e-4
    """Positive penalises I(R;Z), negative rewards it."""
    mi_form: Literal["gram", "cov"] = "gram"
    """Matrices of the mutual information: M x M of the samples, or d x d of the features."""

    recipe = {  # noqa: RUF012
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"lr": 0.4},
    }


class AdaDim(Method[AdaDimConfig]):
    """Backbone, projector, the two losses and alpha."""

    config_class = AdaDimConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        s = self.settings
        width = config.model.projector[-1]
        if s.mi_form == "cov" and s.beta != "off" and width != self.feature_width:
            raise ValueError(
                f"method.mi_form: cov needs an embedding as wide as the representation "
                f"({self.feature_width}), got model.projector ending in {width}; gram takes any"
            )
        self.alpha = Alpha(s, config.optim.epochs)

    @property
    def beta(self) -> float:
        """Signed weight of the mutual information term now."""
        scale = {"off": 0.0, "fixed": 1.0, "adaptive": self.alpha.value}[self.settings.beta]
        return self.settings.beta_scale * scale

    def forward(self, batch: Batch) -> Output:
        s, alpha, beta = self.settings, self.alpha.value, self.beta
        r, z = self.encode(batch.views)
        # Gathered once, for both terms that compare all embeddings.
        gathered = gather_unit_rows(z, self.comm)
        # A term of weight zero is still logged, but costs no backward.
        with torch.set_grad_enabled(torch.is_grad_enabled() and alpha > 0):
            nce = info_nce(z, s.temperature, self.comm, gathered)
        with torch.set_grad_enabled(torch.is_grad_enabled() and alpha < 1):
            vic = configured_vicreg(s, z, self.comm)
        loss = alpha * nce + (1 - alpha) * vic.loss
        terms: dict[str, Tensor | float] = {
            "nce": nce,
            "vicreg": vic.loss,
            **logged(vic),
            "rep/alpha": alpha,
            "rep/beta": beta,
        }
        if s.beta != "off":
            with torch.set_grad_enabled(torch.is_grad_enabled() and beta != 0):
                information = mutual_information(r, z, s.mi_form, self.comm, gathered)
            loss = loss + beta * information
            terms["mutual_information"] = information
        return Output(loss, terms, r, z)

    def measured_rows(self, batch: Batch) -> Tensor:
        """The rows `[n, d]` whose effective rank sets alpha: the first view's z or r."""
        s = self.settings
        with torch.no_grad(), self.measuring(s.alpha_mode == "train_stats"):
            r, z = self.embed(batch.views[0])
        return z if s.alpha_space == "z" else r

    def after_epoch(self, context: Context) -> None:
        """Set alpha for the next epoch."""
        metrics = self.alpha.after_epoch(context, self.measured_rows)
        if metrics:
            context.report(metrics | {"rep/alpha": self.alpha.value, "rep/beta": self.beta})

    def reads_after(self, epoch: int) -> str | None:
        """The purpose of the batches that a measurement takes, where there will be one."""
        return "alpha" if self.alpha.measures_after(epoch) else None

    def get_extra_state(self) -> dict[str, Any]:
        """Alpha's state, for the checkpoint."""
        return self.alpha.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take alpha's state from a checkpoint."""
        self.alpha.load_state(state)
