"""AdaDim's alpha: constant, scheduled, or measured.

A measurement takes random global batches. Their rows (or moments) reach rank 0, rank 0 decomposes,
alpha is broadcast. `alpha_delay` sets only when the broadcast happens: at once, or some epochs
later, so that training goes on while rank 0 decomposes.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from ddp_ssl.config import Config, MethodConfig
from ddp_ssl.data.batch import Batch
from ddp_ssl.errors import MeasurementError
from ddp_ssl.methods.base import Context
from ddp_ssl.metrics.effective_rank import Matrix, global_matrix
from ddp_ssl.utils.background import in_background


class AlphaConfig(MethodConfig):
    """Alpha and its measurement."""

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
    """Epochs between a measurement and the broadcast of its alpha, in which training goes on
    with the old alpha while rank 0 decomposes; null: training waits for rank 0."""
    alpha_center: bool = False
    """Subtract the mean row before the decomposition."""
    alpha_mode: Literal["eval", "train_stats"] = "eval"
    """Norm layers during the measurement: running averages, or each batch's own statistics."""
    alpha_route: Literal["auto", "gather", "gram"] = "auto"
    """Gather the embeddings and take their SVD, or all-reduce a d x d matrix and take its
    eigenvalues: equal to 1e-11, to 1e-4 for embeddings of a few dimensions only. `auto` gathers
    up to 2^20 numbers (512 x 2,048)."""

    def check(self, config: Config) -> None:
        """Refuse a measurement that would begin before the previous one is in force."""
        super().check(config)
        if self.alpha_delay is not None and self.alpha_delay >= self.alpha_every:
            raise ValueError(
                f"method.alpha_delay: expected fewer epochs than method.alpha_every "
                f"({self.alpha_every}), got {self.alpha_delay}"
            )

    def remarks(self, config: Config) -> list[str]:
        """Say if alpha is never measured in time to count."""
        counts = self.alpha_every + (self.alpha_delay or 0) < config.optim.epochs
        if self.alpha != "adaptive" or counts:
            return []
        return [
            f"method.alpha_every: alpha is measured every {self.alpha_every} epochs, and the run "
            f"has {config.optim.epochs}: it stays {self.alpha_init:g} (0 is VICReg alone); a fifth "
            "of the epochs would be accepted and is usual"
        ]


class Alpha:
    """Alpha on every process, with the same bits; `value` is the one in force.

    `history` has an entry for each measurement. `epochs`: of the run.
    """

    def __init__(self, settings: AlphaConfig, epochs: int) -> None:
        s = self.settings = settings
        self.epochs = epochs
        self.value = {"fixed": s.alpha_value, "adaptive": s.alpha_init}.get(s.alpha, 0.0)
        self.history: list[dict[str, float]] = []
        self._pending: PendingAlpha | None = None

    def measures_after(self, epoch: int) -> bool:
        """Whether `after_epoch` will measure; not if the run would end before the value counts."""
        s, done = self.settings, epoch + 1
        in_time = s.alpha_delay is None or done + s.alpha_delay < self.epochs
        return s.alpha == "adaptive" and done % s.alpha_every == 0 and in_time

    def after_epoch(self, context: Context, embed: Callable[[Batch], Tensor]) -> dict[str, float]:
        """Set the value for the next epoch; returns the metrics of a measurement, if one is due.

        `embed`: a batch to the rows `[n, d]` whose effective rank counts. All processes call this
        together; all raise `MeasurementError` if rank 0 cannot decompose.
        """
        s, done = self.settings, context.epoch + 1
        if s.alpha == "linear":
            self.value = done / context.epochs
        elif s.alpha == "cosine":
            self.value = 0.5 * (1 - math.cos(math.pi * (done / context.epochs)))
        if self.measures_after(context.epoch):
            self._pending = self._measure(context, embed)
        if self._pending is not None and self._pending.due <= done:
            return self._apply(context, self._pending)
        return {}

    def _measure(self, context: Context, embed: Callable[[Batch], Tensor]) -> "PendingAlpha":
        """Bring random global batches to rank 0, which begins to decompose them."""
        s, began, done = self.settings, time.perf_counter(), context.epoch + 1
        pending = PendingAlpha(done, done + (s.alpha_delay or 0), context.seed)
        for batch in context.batches(s.alpha_batches, "alpha"):
            matrix = global_matrix(embed(batch), s.alpha_route, s.alpha_center, context.comm)
            pending.bound, pending.batches = matrix.bound, pending.batches + 1
            if context.comm.rank == 0:
                # Beside training the host decomposes; a GPU would take turns with the steps.
                values = matrix.values.cpu() if s.alpha_delay else matrix.values
                pending.matrices.append(replace(matrix, values=values))
        if context.comm.rank == 0:
            pending.begin()
        pending.seconds = time.perf_counter() - began
        return pending

    def _apply(self, context: Context, pending: "PendingAlpha") -> dict[str, float]:
        """alpha = mean of the effective ranks / the largest possible, from rank 0 to all."""
        s, began = self.settings, time.perf_counter()
        mean, problem = math.nan, "see rank 0"
        if context.comm.rank == 0:
            try:
                mean, problem = sum(pending.effective_ranks()) / pending.batches, "not a number"
            except Exception as error:  # the others wait for the broadcast
                problem = f"{type(error).__name__}: {error}"
        mean = context.comm.broadcast(mean)
        if math.isnan(mean):
            raise MeasurementError(
                f"alpha: the effective rank of the batches measured after epoch {pending.epoch} "
                f"could not be computed on rank 0: {problem}"
            )
        self._pending = None
        self.value = min(max(mean / pending.bound, 0.0), 1.0)
        # Seed, purpose and epoch are the whole state of the batches' generator.
        entry = {"epoch": pending.epoch, "alpha": self.value, "effective_rank": mean}
        rest = {"bound": pending.bound, "batches": pending.batches, "seed": pending.seed}
        self.history.append(entry | rest)
        missing = pending.batches < s.alpha_batches
        few = f", all there are of {s.alpha_batches} asked for" if missing else ""
        late = pending.epoch <= context.epoch
        when = f", measured after epoch {pending.epoch}" if late else ""
        context.tell(
            f"alpha {self.value:.4f}: effective rank {mean:.1f} of {pending.bound} "
            f"over {pending.batches} global batches{few}{when}"
        )
        seconds = pending.seconds + time.perf_counter() - began
        return {f"rep/effective_rank_{s.alpha_space}_train": mean, "perf/alpha_s": seconds}

    def state(self) -> dict[str, Any]:
        """The value, its history and the measurement under way, for the checkpoint."""
        pending = None if self._pending is None else self._pending.state()
        return {"alpha": self.value, "history": self.history, "measured": pending}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`; checkpoints made before `alpha_delay` have no `measured`."""
        self.value, self.history = float(state["alpha"]), list(state["history"])
        pending = state.get("measured")
        self._pending = None if pending is None else PendingAlpha.from_state(pending)


@dataclass
class PendingAlpha:
    """A measurement that is not in force yet.

    `epoch`, `due`: epochs done when it is made and when it comes into force. `bound`: the largest
    possible effective rank. `seconds`: how long training has waited for it. Only rank 0 has the
    `matrices` and, once they are decomposed, their effective `ranks`.
    """

    epoch: int
    due: int
    seed: int
    bound: int = 1
    batches: int = 0
    seconds: float = 0.0
    ranks: list[float] | None = None
    matrices: list[Matrix] = field(default_factory=list)
    _work: Future[list[float]] | None = None

    def begin(self) -> Future[list[float]]:
        """Decompose the matrices one after the other, in a thread."""
        self._work = in_background(lambda: [matrix.effective_rank() for matrix in self.matrices])
        return self._work

    def effective_ranks(self) -> list[float]:
        """The effective ranks of all batches; waits for the thread, or starts it after a resume."""
        if self.ranks is None:
            self.ranks = (self._work or self.begin()).result()
        return self.ranks

    def state(self) -> dict[str, Any]:
        """The effective ranks, or the matrices left to decompose; a checkpoint does not wait."""
        work = self._work
        if work is not None and work.done() and work.exception() is None:
            self.ranks = work.result()
        left = self.matrices if self.ranks is None else []
        plain = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return plain | {"matrices": [vars(matrix) for matrix in left]}

    @staticmethod
    def from_state(state: dict[str, Any]) -> "PendingAlpha":
        """The inverse of `state`."""
        return PendingAlpha(**state | {"matrices": [Matrix(**m) for m in state["matrices"]]})
