"""What a method is: modules, a forward that ends in a loss, and optional hooks.

A method is one file: a `MethodConfig` with its own fields and `recipe`, and a `Method` whose
`config_class` it is. State that must survive a restart lives in buffers or in `get_extra_state`.
docs/add-a-method.md walks through one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, MethodConfig
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import ViewLayout, global_batch_norm, stacked_views
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.models import build_backbone, projection_head

C = TypeVar("C", bound=MethodConfig)


@dataclass
class Output:
    """What a forward gives: `features` `[k, n, d_R]` and `embeddings` `[k, n, d]` held here.

    `terms` are logged: a plain name goes under `train/`, one with a slash stays as it is.
    """

    loss: Tensor
    terms: Mapping[str, Tensor | float]
    features: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class Progress:
    """Where the run is: `step` of `total_steps` done, in `epoch` of `epochs` (from 0)."""

    step: int
    total_steps: int
    epoch: int
    epochs: int


@dataclass(frozen=True)
class Context:
    """What a method may use between epochs, on all processes alike."""

    comm: Comm
    seed: int
    epoch: int
    epochs: int
    batches: Callable[[int, str], Iterator[Batch]]
    """`batches(count, purpose)`: that many random global batches of view 0, from a fresh pipeline
    seeded by (seed, purpose, epoch, rank); never the training iterator."""
    report: Callable[[dict[str, float]], None] = field(repr=False)
    """Log figures at this epoch."""
    tell: Callable[[str], None] = field(repr=False)
    """Print a line on rank 0."""


class Method(nn.Module, Generic[C]):
    """Backbone and projector, and how views become representations `r` and embeddings `z`."""

    config_class: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self.settings: C = config.method  # type: ignore[assignment]
        model = config.model
        self.num_views = config.num_views
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.optim.precision)
        self.separate = model.views_forward == "separate" or (
            model.views_forward == "auto" and config.num_views == 2
        )
        sizes = {group.size for group in config.data.views}
        sizes.add(config.data.val_size or max(sizes))
        self.backbone, self.feature_width = build_backbone(model, sorted(sizes))
        self.projector: nn.Module = projection_head(
            self.feature_width, model.projector, model.projector_norm, model.projector_bias
        )
        self.layout = ViewLayout()
        self._reduce_norm = model.batch_norm == "global"

    def finish(self) -> None:
        """Called once after construction: make every batch norm global and per view."""
        global_batch_norm(self, self.layout, self._reduce_norm)

    # --- to override -------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        """The loss of one step; the only call inside DDP's forward."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: `name`, `params` (name, parameter) and own settings."""
        return [{"name": "network", "params": trainable(self)}]

    def before_optimizer(self, progress: Progress) -> None:
        """After backward, before the optimiser's step: for clearing gradients."""

    def after_step(self, progress: Progress) -> None:
        """After the optimiser's step: momentum networks, temperatures, queues."""

    def on_start(self, context: Context) -> None:
        """Before the first step of a fresh run."""

    def after_epoch(self, context: Context) -> None:
        """After each epoch: what is measured between epochs."""

    # --- given -------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[n, 3, S, S]` to `r` `[n, d_R]` and `z` `[n, d]` in float32 or wider."""
        r = self.backbone(at_least_float32(x))
        return at_least_float32(r), at_least_float32(self.projector(r))

    def encode(
        self, views: list[Tensor], network: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """All views held here to `r` `[k, n, d_R]` and `z` `[k, n, d]`.

        Views of equal size go through the network (default: backbone and projector) stacked, each
        normalised by its own statistics or pooled, as `model.views_forward` says.
        """
        outputs: list[tuple[Tensor, Tensor]] = []
        start, images = 0, views[0].shape[0]
        while start < len(views):
            size = views[start].shape[-1]
            group = [v for v in views[start:] if v.shape[-1] == size]
            total = len(group) * self.comm.view_shards if self.separate else 1
            held = self.comm.views if self.separate else slice(None)
            stacked = torch.cat(group) if len(group) > 1 else group[0]
            with (
                stacked_views(self.layout, total, held),
                torch.autocast(stacked.device.type, self.autocast, self.autocast is not None),
            ):
                r, z = (network or self._forward)(stacked)
            outputs.append((r.view(len(group), images, -1), z.view(len(group), images, -1)))
            start += len(group)
        r, z = (
            torch.cat(part) if len(part) > 1 else part[0] for part in zip(*outputs, strict=True)
        )
        return r, z

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.backbone(x)
        return r, self.projector(r)


def trainable(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything in the module that is trained."""
    return [(prefix + name, p) for name, p in module.named_parameters() if p.requires_grad]
