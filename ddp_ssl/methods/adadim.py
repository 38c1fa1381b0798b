"""AdaDim: VICReg and InfoNCE, balanced by the effective rank of the embeddings.

Kokilepersaud, Prabhushankar & AlRegib 2025. L = alpha NCE + (1 - alpha) VICReg + beta I(R;Z), where
alpha is the effective rank of the embeddings divided by the largest it can be, measured over the
global batch every `alpha_every` epochs. A collapsed embedding is decorrelated; one that already
fills its space is made uniform.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import info_nce, mutual_information
from ddp_ssl.losses.common import at_least_float32, gather_unit_rows, unit_rows
from ddp_ssl.methods.base import Context, Method, Output
from ddp_ssl.methods.vicreg import VICRegConfig, configured_vicreg
from ddp_ssl.metrics.effective_rank import global_effective_ranks, matrices
from ddp_ssl.threads import beside


class AdaDimConfig(VICRegConfig):
    """The balance of decorrelation and uniformity, and how it is measured."""

    name: str = "adadim"
    temperature: float = Field(0.1, gt=0)
    """Temperature of InfoNCE's cosine similarities."""
    alpha: Literal["adaptive", "fixed", "linear", "cosine"] = "adaptive"
    """Weight of InfoNCE against VICReg: measured, constant, or growing from 0 to 1 over the run."""
    alpha_value: float = Field(0.5, ge=0, le=1)
    """The constant of `alpha: fixed`: 0 is VICReg, 1 is SimCLR."""
    alpha_init: float = Field(0.0, ge=0, le=1)
    """Adaptive alpha before the first measurement."""
    alpha_every: int = Field(20, ge=1)
    """Epochs between measurements of alpha (the paper's nu)."""
    alpha_batches: int = Field(10, ge=1)
    """Random global batches whose effective ranks are averaged."""
    alpha_space: Literal["z", "r"] = "z"
    """Measure the embeddings z or the representations r."""
    alpha_delay: int = Field(0, ge=0)
    """Epochs for which training goes on with the alpha before while rank 0 decomposes the batches
    of a measurement; 0: it waits, and the processes share the decompositions."""
    alpha_center: bool = False
    """Subtract the mean row before the SVD."""
    alpha_mode: Literal["eval", "train_stats"] = "eval"
    """Norm layers during the measurement: running averages, or each batch's own statistics."""
    alpha_route: Literal["auto", "gather", "gram"] = "auto"
    """Gather the embeddings and take their SVD, or all-reduce a d x d matrix and take its
    eigenvalues: equal to 1e-11, to 1e-4 for embeddings of a few dimensions only. `auto` gathers
    up to 2^20 numbers (512 x 2,048)."""
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

    def check(self, config: Config) -> None:
        """Refuse a measurement that would begin before the one before is in use."""
        super().check(config)
        if self.alpha_delay >= self.alpha_every:
            raise ValueError(
                f"method.alpha_delay: expected fewer epochs than method.alpha_every "
                f"({self.alpha_every}), got {self.alpha_delay}"
            )


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
        self.alpha = {"fixed": s.alpha_value, "adaptive": s.alpha_init}.get(s.alpha, 0.0)
        self.history: list[dict[str, float]] = []
        self.measured: dict[str, Any] | None = None  # not yet in use

    @property
    def beta(self) -> float:
        """Signed weight of the mutual information term now."""
        scale = {"off": 0.0, "fixed": 1.0, "adaptive": self.alpha}[self.settings.beta]
        return self.settings.beta_scale * scale

    def forward(self, batch: Batch) -> Output:
        s = self.settings
        r, z = self.encode(batch.views)
        # Once, for both terms that compare all embeddings.
        unit = unit_rows(at_least_float32(z.detach()))
        gathered = gather_unit_rows(z, unit, self.comm)
        # A term of weight zero is still logged, but costs no backward.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha > 0):
            nce = info_nce(z, s.temperature, self.comm, gathered)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha < 1):
            vic = configured_vicreg(s, z, self.comm)
        loss = self.alpha * nce + (1 - self.alpha) * vic.loss
        terms: dict[str, Tensor | float] = {
            "nce": nce,
            "vicreg": vic.loss,
            "vicreg_invariance": vic.invariance,
            "vicreg_variance": vic.variance,
            "vicreg_covariance": vic.covariance,
            "rep/alpha": self.alpha,
            "rep/beta": self.beta,
        }
        if s.beta != "off":
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.beta != 0):
                information = mutual_information(r, z, s.mi_form, self.comm, gathered)
            loss = loss + self.beta * information
            terms["mutual_information"] = information
        return Output(loss, terms, r, z)

    def after_epoch(self, context: Context) -> None:
        """Set alpha for the next epoch."""
        s = self.settings
        progress = (context.epoch + 1) / context.epochs
        if s.alpha == "linear":
            self.alpha = progress
        elif s.alpha == "cosine":
            self.alpha = 0.5 * (1 - math.cos(math.pi * progress))
        elif s.alpha == "adaptive":
            if self._measures_after(context.epoch):
                self._measure(context)
            if self.measured is not None and self.measured["due"] <= context.epoch + 1:
                self._use(context, self.measured)

    def reads_after(self, epoch: int) -> str | None:
        """Batches to measure, if training is not to wait."""
        return "alpha" if self.settings.alpha_delay and self._measures_after(epoch) else None

    def _measures_after(self, epoch: int) -> bool:
        s = self.settings
        return s.alpha == "adaptive" and (epoch + 1) % s.alpha_every == 0

    def _measure(self, context: Context) -> None:
        """The effective ranks of random global batches, or on rank 0 what will become of them."""
        s, began = self.settings, time.perf_counter()
        how = (s.alpha_route, s.alpha_center, context.comm)

        def embedded() -> Iterator[Tensor]:
            for batch in context.batches(s.alpha_batches, "alpha"):
                with torch.no_grad(), self.measuring(s.alpha_mode == "train_stats"):
                    r, z = self.embed(batch.views[0])
                yield z if s.alpha_space == "z" else r

        ranks: list[float] | Future[list[float]] | None
        if s.alpha_delay:
            kept, bound, count = [], 1, 0
            for matrix in matrices(embedded(), *how):
                bound, count = matrix.bound, count + 1
                if context.comm.rank == 0:
                    kept.append(matrix.on_cpu())
            ranks = beside(lambda: [float(m.effective_rank()) for m in kept]) if kept else None
        else:
            ranks, bound = global_effective_ranks(embedded(), *how)
            count = len(ranks)
        self.measured = {
            "epoch": context.epoch + 1,
            "due": context.epoch + 1 + s.alpha_delay,
            "ranks": ranks,
            "bound": bound,
            "batches": count,
            "seed": context.seed,  # with purpose and epoch, the whole state of the generator
            "seconds": time.perf_counter() - began,
        }

    def _use(self, context: Context, measured: dict[str, Any]) -> None:
        """alpha = mean of the effective ranks / min(rows, d), the same on all processes."""
        s, began = self.settings, time.perf_counter()
        ranks, bound, count = measured["ranks"], measured["bound"], measured["batches"]
        if isinstance(ranks, Future):
            ranks = ranks.result()
        mean = 0.0 if ranks is None else sum(ranks) / count
        if s.alpha_delay:
            mean = context.comm.broadcast(mean)
        self.measured = None
        self.alpha = min(max(mean / bound, 0.0), 1.0)
        kept = {name: measured[name] for name in ("epoch", "bound", "batches", "seed")}
        self.history.append({"alpha": self.alpha, "effective_rank": mean, **kept})
        context.report(
            {
                f"rep/effective_rank_{s.alpha_space}_train": mean,
                "rep/alpha": self.alpha,
                "rep/beta": self.beta,
                "perf/alpha_s": measured["seconds"] + time.perf_counter() - began,
            }
        )
        few = f", all there are of {s.alpha_batches} asked for" if count < s.alpha_batches else ""
        when = f", measured after epoch {measured['epoch']}" if s.alpha_delay else ""
        context.tell(
            f"alpha {self.alpha:.4f}: effective rank {mean:.1f} of {bound} "
            f"over {count} global batches{few}{when}"
        )

    def get_extra_state(self) -> dict[str, Any]:
        """alpha, its history and what is being measured, for the checkpoint."""
        return {"alpha": self.alpha, "history": self.history, "measured": self.measured}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take alpha, its history and what was being measured from a checkpoint."""
        self.alpha, self.history = float(state["alpha"]), list(state["history"])
        self.measured = state.get("measured")
