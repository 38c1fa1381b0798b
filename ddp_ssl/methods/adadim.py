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
from dataclasses import dataclass, field
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
from ddp_ssl.metrics.effective_rank import Matrix, global_effective_ranks, matrices
from ddp_ssl.utils.background import in_background


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
    alpha_delay: int | None = Field(None, ge=1)
    """Epochs for which training goes on with the alpha before while rank 0 decomposes the batches
    of a measurement; null: it waits, and the processes share the decompositions."""
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
        if self.alpha_delay is not None and self.alpha_delay >= self.alpha_every:
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
        self.epochs = config.optim.epochs
        self.measured: Measured | None = None  # not yet in use

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
            if self.measured is not None and self.measured.due <= context.epoch + 1:
                self._use(context, self.measured)

    def reads_after(self, epoch: int) -> str | None:
        """Batches to measure, if training is not to wait."""
        return "alpha" if self.settings.alpha_delay and self._measures_after(epoch) else None

    def _measures_after(self, epoch: int) -> bool:
        """Not where training would be over before the value is in use."""
        s, done = self.settings, epoch + 1
        used = s.alpha_delay is None or done + s.alpha_delay < self.epochs
        return s.alpha == "adaptive" and done % s.alpha_every == 0 and used

    def _measure(self, context: Context) -> None:
        """The effective ranks of random global batches, or on rank 0 what will become of them."""
        s, began = self.settings, time.perf_counter()
        how = (s.alpha_route, s.alpha_center, context.comm)

        def embedded() -> Iterator[Tensor]:
            for batch in context.batches(s.alpha_batches, "alpha"):
                with torch.no_grad(), self.measuring(s.alpha_mode == "train_stats"):
                    r, z = self.embed(batch.views[0])
                yield z if s.alpha_space == "z" else r

        done = context.epoch + 1
        measured = Measured(done, done + (s.alpha_delay or 0), context.seed)
        if s.alpha_delay is None:
            measured.ranks, measured.bound = global_effective_ranks(embedded(), *how)
            measured.batches = len(measured.ranks)
        else:
            for matrix in matrices(embedded(), *how):
                measured.bound, measured.batches = matrix.bound, measured.batches + 1
                if context.comm.rank == 0:
                    measured.matrices.append(matrix.on_cpu())
            if measured.matrices:
                measured.begin()
        measured.seconds = time.perf_counter() - began
        self.measured = measured

    def _use(self, context: Context, measured: Measured) -> None:
        """alpha = mean of the effective ranks / min(rows, d), the same on all processes."""
        s, began = self.settings, time.perf_counter()
        mean = 0.0
        if context.comm.rank == 0 or s.alpha_delay is None:
            mean = sum(measured.effective_ranks()) / measured.batches
        if s.alpha_delay is not None:
            mean = context.comm.broadcast(mean)
        self.measured = None
        self.alpha = min(max(mean / measured.bound, 0.0), 1.0)
        self.history.append(
            {
                "epoch": measured.epoch,
                "alpha": self.alpha,
                "effective_rank": mean,
                "bound": measured.bound,
                "batches": measured.batches,
                "seed": measured.seed,  # with purpose and epoch, all of the generator's state
            }
        )
        context.report(
            {
                f"rep/effective_rank_{s.alpha_space}_train": mean,
                "rep/alpha": self.alpha,
                "rep/beta": self.beta,
                "perf/alpha_s": measured.seconds + time.perf_counter() - began,
            }
        )
        missing = measured.batches < s.alpha_batches
        few = f", all there are of {s.alpha_batches} asked for" if missing else ""
        when = f", measured after epoch {measured.epoch}" if s.alpha_delay is not None else ""
        context.tell(
            f"alpha {self.alpha:.4f}: effective rank {mean:.1f} of {measured.bound} "
            f"over {measured.batches} global batches{few}{when}"
        )

    def get_extra_state(self) -> dict[str, Any]:
        """alpha, its history and what is being measured, for the checkpoint."""
        measured = None if self.measured is None else self.measured.state()
        return {"alpha": self.alpha, "history": self.history, "measured": measured}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take alpha, its history and what was being measured from a checkpoint."""
        self.alpha, self.history = float(state["alpha"]), list(state["history"])
        measured = state.get("measured")
        self.measured = None if measured is None else Measured.of(measured)


@dataclass
class Measured:
    """Effective ranks that are not yet in use; on rank 0, while they are computed, of what."""

    epoch: int
    """Epochs done when it was measured."""
    due: int
    """And when it is to be in use."""
    seed: int
    bound: int = 1
    batches: int = 0
    seconds: float = 0.0
    ranks: list[float] | None = None
    matrices: list[Matrix] = field(default_factory=list)
    _beside: Future[list[float]] | None = None

    def decompose(self) -> list[float]:
        """One batch after the other."""
        return [float(matrix.effective_rank()) for matrix in self.matrices]

    def begin(self) -> None:
        """Decompose in a thread."""
        self._beside = in_background(self.decompose)

    def effective_ranks(self) -> list[float]:
        """Those of all batches; waits for them."""
        if self.ranks is None:
            if self._beside is None:  # resumed
                self.begin()
            assert self._beside is not None
            self.ranks = self._beside.result()
        return self.ranks

    def state(self) -> dict[str, Any]:
        """The effective ranks, or what is left to decompose: a checkpoint does not wait."""
        ranks, beside = self.ranks, self._beside
        if ranks is None and beside is not None and beside.done():
            ranks = beside.result()
        left = [vars(matrix) for matrix in self.matrices] if ranks is None else []
        named = {name: getattr(self, name) for name in ("epoch", "due", "seed", "bound", "batches")}
        return named | {"seconds": self.seconds, "ranks": ranks, "matrices": left}

    @staticmethod
    def of(state: dict[str, Any]) -> Measured:
        """From `state`."""
        return Measured(**state | {"matrices": [Matrix(**m) for m in state["matrices"]]})
