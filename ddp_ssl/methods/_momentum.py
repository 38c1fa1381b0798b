"""Momentum networks: a second backbone and projector that follow the trained ones slowly.

This file is no method. `MomentumMethod` is the base of the methods that learn from such a teacher
(BYOL, MoCo, ReSSL, DINO).
"""

import copy
from typing import Generic, TypeVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ddp_ssl.config import MethodConfig
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.methods.base import Method, Progress
from ddp_ssl.optim import cosine


class MomentumConfig(MethodConfig):
    """How slowly the momentum network follows."""

    momentum: float = Field(0.99, ge=0, le=1)
    """Share that the momentum network keeps of itself at the first step."""
    final_momentum: float = Field(1.0, ge=0, le=1)
    """The same at the end of the run; it follows a cosine."""


M = TypeVar("M", bound=MomentumConfig)


class MomentumMethod(Method[M], Generic[M]):
    """A method with a momentum copy of backbone and projector, `self.momentum`.

    `finish` copies what the subclass has built of the two by then. The copy has no gradient, so
    DDP's reducer and the optimiser do not see it. It is in the state dict and so in checkpoints.
    All ranks update it alike, since their weights are alike. It takes the memory of backbone and
    projector once more on every rank (ResNet-50 with a 4096-256 head: 130 MB in float32).

    As in solo-learn, only parameters are averaged. The copy runs in training mode: like the trained
    network it normalises by the statistics of the batch, global and per view. It keeps running
    averages of its own. It drops no paths (DINO's official code).
    """

    momentum: nn.ModuleDict

    def finish(self) -> None:
        """Copy the networks, then do what every method does."""
        from timm.layers.drop import DropPath  # here, so that `--help` does not wait for it

        parts = {"backbone": self.backbone, "projector": self.projector}
        self.momentum = nn.ModuleDict({name: copy.deepcopy(part) for name, part in parts.items()})
        super().finish()
        self.momentum.requires_grad_(False)  # after the norm layers have been replaced
        for module in self.momentum.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0

    @torch.no_grad()
    def targets(self, views: list[Tensor]) -> Tensor:
        """The momentum embeddings `[l, n, d]` of the large views held here, without gradient.

        `all_views` extends them to all large views, `comm.gather` to all images too.
        """
        _, z = self.encode(views[: self.held_large], self._momentum_forward)
        return at_least_float32(z)

    def _momentum_forward(self, x: Tensor) -> tuple[Tensor, ...]:
        r = self.in_parts(self.momentum["backbone"], x)
        return r, self.momentum["projector"](r)

    def after_step(self, progress: Progress) -> None:
        """Move the momentum network; a subclass with more to do calls this too."""
        s = self.settings
        keep = cosine(s.momentum, s.final_momentum, progress.step, progress.total_steps)
        follow(self.momentum, nn.ModuleList(getattr(self, name) for name in self.momentum), keep)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, keep: float) -> None:
    """Set every parameter of `average` to keep * itself + (1 - keep) * `network`'s; no buffers."""
    ours = cast(list[Tensor], list(average.parameters()))
    theirs = cast(list[Tensor], list(network.parameters()))
    torch._foreach_lerp_(ours, theirs, 1 - keep)
