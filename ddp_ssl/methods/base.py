"""The base of all methods: modules, a forward that ends in a loss, and optional hooks.

A method is one file: a `MethodConfig` with its own fields and `recipe`, and a `Method` whose
`config_class` it is. State that must survive a restart lives in buffers or in `get_extra_state`.
docs/add-a-method.md walks through one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, MethodConfig
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import ViewLayout, global_batch_norm, stacked_views
from ddp_ssl.losses.common import all_views, at_least_float32
from ddp_ssl.models import build_backbone, projection_head, recompute

C = TypeVar("C", bound=MethodConfig)


class NeedsVariance(MethodConfig):
    """Base of the configs of losses with a variance over the images."""

    def check(self, config: Config) -> None:
        """Refuse one image: its variance is undefined."""
        if config.data.batch_size < 2:
            raise ValueError(
                f"data.batch_size: {self.name} needs the variance over 2 images or more, got "
                f"{config.data.batch_size}"
            )


@dataclass
class Output:
    """The result of a forward: `features` `[k, n, d_R]` and `embeddings` `[k, n, d]` held here.

    `terms` are logged: a plain name goes under `train/`, one with a slash stays as it is.
    """

    loss: Tensor
    terms: Mapping[str, Tensor | float]
    features: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class Progress:
    """The progress of a run: `step` of `total_steps` done, in `epoch` of `epochs` (from 0)."""

    step: int
    total_steps: int
    epoch: int
    epochs: int


@dataclass(frozen=True)
class Context:
    """Arguments of a method's hooks between epochs, the same on all processes."""

    comm: Comm
    seed: int
    epoch: int
    epochs: int
    batches: Callable[[int, str], Iterator[Batch]]
    """`batches(count, purpose)`: that many random global batches of view 0, from a fresh pipeline
    seeded by (seed, purpose, epoch, rank); never the training iterator."""
    report: Callable[[dict[str, float]], None] = field(repr=False)  # log metrics at this epoch
    tell: Callable[[str], None] = field(repr=False)  # print a line on rank 0


class Method(nn.Module, Generic[C]):
    """Backbone and projector, and how views become representations `r` and embeddings `z`."""

    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    projector_last_norm: ClassVar[Literal["none", "batch", "plain"]] = "none"
    """The norm after the projector's last layer: none, or a batch norm with or without affine."""
    predictor: nn.Module
    """In the methods that have one."""

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self.settings: C = config.method  # type: ignore[assignment]
        model = config.model
        self.num_views = config.num_views
        largest = max(group.size for group in config.data.views)
        self.num_large = sum(g.count for g in config.data.views if g.size == largest)
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.optim.precision)
        self.separate = model.views_forward == "separate" or (
            model.views_forward == "auto" and config.num_views == 2
        )
        sizes = {group.size for group in config.data.views}
        sizes.add(config.data.central_crop.size)
        self.backbone, self.feature_width = build_backbone(model, sorted(sizes))
        recompute(self.backbone, config)
        self.parts, self.ema = config.optim.accumulate, model.ema
        how = model.projector_norm, model.projector_bias, self.projector_last_norm
        self.projector: nn.Module = projection_head(self.feature_width, model.projector, *how)
        self.layout = ViewLayout()
        self._compiled = model.compile
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
        """After each epoch: measurements between epochs."""

    def reads_after(self, epoch: int) -> str | None:
        """The purpose of `context.batches` in `after_epoch`, whose first batch is prefetched."""

    # --- given -------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[n, 3, S, S]` to `r` `[n, d_R]` and `z` `[n, d]` in float32 or wider."""
        r = self.backbone(at_least_float32(x))
        return at_least_float32(r), at_least_float32(self.projector(r))

    def encode(
        self, views: list[Tensor], network: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    ) -> tuple[Tensor, ...]:
        """All views held here to `r` `[k, n, d_R]` and `z` `[k, n, d]`.

        Views of equal size go through the network stacked, in autocast's precision, each normalised
        by its own statistics or pooled, as `model.views_forward` says. `network`: another one than
        backbone and projector, such as `with_predictor`, with any number of outputs
        `[views * n, width]`.
        """
        outputs: list[tuple[Tensor, ...]] = []
        start, images = 0, views[0].shape[0]
        while start < len(views):
            size = views[start].shape[-1]
            group = [v for v in views[start:] if v.shape[-1] == size]
            total = len(group) * self.comm.view_shards if self.separate else 1
            held = self.comm.views if self.separate else slice(None)
            stacked = joined(group, self.autocast)
            with (
                stacked_views(self.layout, total, held),
                # The cache would add up the parts' gradients of a weight in half precision.
                torch.autocast(
                    stacked.device.type,
                    self.autocast,
                    self.autocast is not None,
                    cache_enabled=self.parts == 1,
                ),
            ):
                parts = self._apply_network(network or self._forward, stacked)
            outputs.append(tuple(part.view(len(group), images, -1) for part in parts))
            start += len(group)
        return tuple(
            torch.cat(part) if len(part) > 1 else part[0] for part in zip(*outputs, strict=True)
        )

    @cached_property
    def _apply_network(self) -> Callable[..., tuple[Tensor, ...]]:
        # Each size of image gets a graph of its own (of up to 8), not one for any size.
        return torch.compile(_apply, dynamic=False) if self._compiled else _apply

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        r = self.in_parts(self.backbone, x)
        return r, self.projector(r)

    def in_parts(self, backbone: nn.Module, x: Tensor) -> Tensor:
        """The backbone's output, of one part of the images after the other (`optim.accumulate`).

        Of a part no graph is kept. The backward pass computes it again, with the same random
        numbers.
        """
        if self.parts == 1:
            return cast(Tensor, backbone(x))
        run: Callable[[Tensor], Tensor] = backbone
        if torch.is_grad_enabled():  # and not a momentum network
            run = partial(checkpoint, backbone, use_reentrant=False)
        return torch.cat([run(part) for part in x.chunk(self.parts)])

    def with_predictor(self, x: Tensor) -> tuple[Tensor, ...]:
        """A network for `encode`: `r`, `z` and the predictor's output `p`."""
        r, z = self._forward(x)
        return r, z, self.predictor(z)

    @property
    def held_large(self) -> int:
        """Number of large views among those held here; they come first."""
        return self.num_large // self.comm.view_shards

    @contextlib.contextmanager
    def measuring(self, batch_statistics: bool) -> Iterator[None]:
        """Norm layers by each batch's own statistics, or by their running averages (eval mode).

        Mode and buffers are restored afterwards.
        """
        training = self.training
        saved = {name: value.clone() for name, value in self.named_buffers()}
        self.train(batch_statistics)
        try:
            yield
        finally:
            for name, value in self.named_buffers():
                value.copy_(saved[name])
            self.train(training)

    def all_views(self, x: Tensor) -> Tensor:
        """All views, in order, of the images held here, from those held here (`losses.common`)."""
        return all_views(x, self.comm)

    def over_pairs(self, loss: Callable[[int, int], Tensor]) -> Tensor:
        """Mean of `loss(index, target)` over all pairs of a view and another, large view.

        `index` counts the views held here, `target` all large views. Returns this process's part,
        whose mean over processes is the mean, given losses that are means over the images.
        """
        parts = [loss(index, target) for index, target in self._held_pairs()]
        return torch.stack(parts).sum() * (self.comm.view_shards / self.num_pairs)

    def over_pair_rows(
        self, loss: Callable[[Tensor, Tensor], Tensor], views: Tensor, targets: Tensor
    ) -> Tensor:
        """The same for a `loss` in which no image sees another one, called once for all pairs.

        It gets two tensors `[P n, d]`: rows of `views` `[k, n, d]`, those held here, and the rows
        of `targets` `[l, n, d]`, all large views, that belong to them. A row is copied once for
        each of its pairs.
        """
        pairs, views_of, targets_of = self._held_pairs(), views.unbind(), targets.unbind()
        x = torch.cat([views_of[index] for index, _ in pairs])
        mean = loss(x, torch.cat([targets_of[target] for _, target in pairs]))
        share = len(pairs) * self.comm.view_shards / self.num_pairs
        return mean if share == 1 else mean * share

    def _held_pairs(self) -> list[tuple[int, int]]:
        held = range(self.num_views)[self.comm.views]
        large = range(self.num_large)
        return [(i, target) for i, view in enumerate(held) for target in large if target != view]

    @property
    def num_pairs(self) -> int:
        """Number of pairs of a view and another, large view."""
        return self.num_large * (self.num_views - 1)


def _apply(network: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    return network(x)


def joined(views: list[Tensor], precision: torch.dtype | None) -> Tensor:
    """Views `[n, C, S, S]` as one batch `[views * n, C, S, S]` in the precision of autocast.

    Images are cast in the same pass. Those in float64, which autocast leaves alone, and those with
    a gradient keep their precision.
    """
    first = views[0]
    if precision is None or first.dtype == torch.float64 or any(v.requires_grad for v in views):
        return torch.cat(views) if len(views) > 1 else first
    if len(views) == 1:
        return first.to(precision)
    # With one channel a batch is both.
    last = first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    batch = torch.empty(
        (len(views) * len(first), *first.shape[1:]),
        dtype=precision,
        device=first.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    torch._foreach_copy_(list(batch.chunk(len(views))), views)
    return batch


def trainable(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything in the module that is trained."""
    return [(prefix + name, p) for name, p in module.named_parameters() if p.requires_grad]
