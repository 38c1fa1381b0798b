"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al. 2021)."""

import copy
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.losses import dino
from ddp_ssl.losses.common import at_least_float32, unit_rows
from ddp_ssl.methods._momentum import MomentumConfig, MomentumMethod
from ddp_ssl.methods.base import Context, Output, Progress


class DINOConfig(MomentumConfig):
    """Follow a momentum network's centred and sharpened distribution over prototypes."""

    name: str = "dino"
    momentum: float = Field(0.9995, ge=0, le=1)
    """Share that the momentum network keeps of itself at the first step."""
    prototypes: int = Field(4096, ge=2)
    """Outputs of the head (65,536 in the paper)."""
    student_temperature: float = Field(0.1, gt=0)
    """Temperature of the trained network's distribution."""
    teacher_temperature: float = Field(0.07, gt=0)
    """Temperature of the momentum network's, after the warm-up."""
    warmup_teacher_temperature: float = Field(0.04, gt=0)
    """The same at the start; a higher one can be unstable."""
    warmup_teacher_epochs: int = Field(50, ge=0)
    """Epochs over which the momentum network's temperature grows linearly, once an epoch."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """Share that the centre keeps of itself."""
    freeze_epochs: int = Field(1, ge=0)
    """Epochs at the start in which the last layer stays as it is."""
    norm_last_layer: bool = True
    """True: the rows of the last layer have length one. False: their lengths are trained, as in the
    paper for small ViTs."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [2048, 2048, 256], "projector_norm": "none"},
        "data": {"views": [{"count": 2, "recipe": "asym"}]},
        "optim": {"lr": 0.3, "weight_decay": 1e-6},
    }


class DINO(MomentumMethod[DINOConfig]):
    """Backbone, projector and prototypes; a momentum copy of all three; the centre.

    The momentum network sees the large views, the trained one all views. Each view predicts every
    large view but itself. `model.projector` is the head up to its bottleneck, with GELU; `embed`
    returns the bottleneck. The recipe has no batch norm there, as the paper's ViTs and solo-learn.
    The centre (one number per prototype, replicated) is the running mean of the momentum network's
    outputs over the global batch.
    """

    config_class = DINOConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        s = self.settings
        assert isinstance(self.projector, nn.Sequential)
        for index, layer in enumerate(self.projector):
            if isinstance(layer, nn.ReLU):
                self.projector[index] = nn.GELU()
            elif isinstance(layer, nn.Linear):
                # The official code truncates at 100 deviations, which is no truncation. torch's
                # versions draw a truncated distribution in different ways, a normal one in one way.
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(config.model.projector[-1], s.prototypes, s.norm_last_layer)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(s.prototypes))
        self.teacher_temperature = self._temperature(0)
        self._newest: Tensor | None = None

    def finish(self) -> None:
        """Copy the prototypes too."""
        super().finish()
        self.momentum["prototypes"] = copy.deepcopy(self.prototypes).requires_grad_(False)

    def forward(self, batch: Batch) -> Output:
        s, comm = self.settings, self.comm
        held = unit_rows(self.targets(batch.views))  # [l, n, d]
        r, z = self.encode(batch.views)
        with torch.autocast(z.device.type, enabled=False):
            with torch.no_grad():
                teacher = self.momentum["prototypes"](self.all_views(held))
                # The prototypes are linear, so the mean output is the output of the mean row.
                total = comm.sum(held.sum((0, 1)))
                mean = total / (self.num_large * held.shape[1] * comm.data_shards)
                self._newest = self.momentum["prototypes"](mean)
            student = self.prototypes(unit_rows(at_least_float32(z)))
            temperatures = s.student_temperature, self.teacher_temperature
            loss = dino(student, teacher, self.center, *temperatures, comm)
        return Output(loss, {"teacher_temperature": self.teacher_temperature}, r, z)

    def before_optimizer(self, progress: Progress) -> None:
        """Freeze the last layer during the first epochs."""
        if progress.epoch < self.settings.freeze_epochs:
            for parameter in self.prototypes.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the momentum networks and the centre."""
        super().after_step(progress)
        assert self._newest is not None
        self.center.lerp_(self._newest, 1 - self.settings.center_momentum)
        self._newest = None

    def after_epoch(self, context: Context) -> None:
        """Set the teacher's temperature of the next epoch."""
        self.teacher_temperature = self._temperature(context.epoch + 1)

    def _temperature(self, epoch: int) -> float:
        s = self.settings
        if epoch >= s.warmup_teacher_epochs:
            return s.teacher_temperature
        done = epoch / max(s.warmup_teacher_epochs - 1, 1)
        first = s.warmup_teacher_temperature
        return first + done * (s.teacher_temperature - first)

    def get_extra_state(self) -> dict[str, Any]:
        """The teacher's temperature of this epoch."""
        return {"teacher_temperature": self.teacher_temperature}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the temperature from a checkpoint."""
        self.teacher_temperature = float(state["teacher_temperature"])


class Prototypes(nn.Module):
    """A weight-normed linear layer without bias: `[..., d] -> [..., P]`."""

    def __init__(self, width: int, count: int, norm: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(width, count, bias=False).weight.detach())
        self.length = None if norm else nn.Parameter(torch.ones(count))

    def forward(self, x: Tensor) -> Tensor:
        weight = unit_rows(self.weight)
        if self.length is not None:
            weight = weight * self.length[:, None]
        return x @ weight.T
