"""Batch normalisation over the global batch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddp_ssl.distributed.primitives import all_gather_single, run_collective


@dataclass
class ViewLayout:
    """The views that a stacked batch holds. `stacked_views` sets it for all norm layers at once."""

    total: int = 1
    held: slice = field(default_factory=lambda: slice(None))
    statistics: "dict[GlobalBatchNorm, _Statistics] | None" = None
    """Statistics of the norm layers on a GPU within `stacked_views`, for their running averages."""
    constants: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Those that the layers share."""

    @property
    def local(self) -> int:
        """Number of views stacked here."""
        return len(range(self.total)[self.held])


@contextlib.contextmanager
def stacked_views(layout: ViewLayout, total: int, held: slice) -> Iterator[None]:
    """In this context a batch is the stacked views `held`, out of `total` over all view shards."""
    before = layout.total, layout.held, layout.statistics
    _update_averages(before[2])
    layout.total, layout.held, layout.statistics = total, held, {}
    try:
        yield
        _update_averages(layout.statistics)
    finally:
        layout.total, layout.held, layout.statistics = before


def _by_view(x: Tensor, views: int) -> tuple[Tensor, list[int], tuple[int, ...]]:
    """Split `x` `[views * n, C, ...]`, contiguous in `_format(x)`, by view, without a copy.

    Returns the split tensor, the dimensions to reduce and the shape of the statistics.
    """
    channels = x.shape[1]
    if x.dim() == 2:
        return x.view(views, -1, channels), [1], (-1, 1, channels)
    if x.dim() == 4 and _format(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).view(views, -1, channels), [1], (-1, 1, channels)
    shape = (views, x.shape[0] // views, channels, -1)
    return x.view(shape), [1, 3], (-1, 1, channels, 1)


def _format(x: Tensor) -> torch.memory_format:
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _affine(like: Tensor, views: int, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` for `x` from `_by_view`, as a fresh tensor laid out as `like`."""
    out = torch.empty_like(like, memory_format=_format(like))
    rows = _by_view(out, views)[0]
    if out.dtype == x.dtype and not torch.compiler.is_compiling():
        torch.addcmul(shift, x, scale, out=rows)
    else:
        rows.copy_(torch.addcmul(shift, x, scale))
    return out


# An all-reduce in place. A compiled graph can hold it, since it is an operator of its own.
_NAME = "ddp_ssl::sum_statistics"
torch.library.define(_NAME, "(Tensor(a!) x) -> ()")
torch.library.register_fake(_NAME, lambda x: None)
torch.library.impl(
    _NAME, "CompositeExplicitAutograd", lambda x: run_collective("norm", dist.all_reduce, x)
)


def _total(own: Tensor, layout: ViewLayout, reduce: bool) -> Tensor:
    """Sums `[total, ...]` over all processes, from those of the views held here `[views, ...]`."""
    if not reduce:
        return own
    every = own
    if layout.total > layout.local:  # other processes hold other views
        every = own.new_zeros(layout.total, *own.shape[1:])
        every[layout.held] = own
    torch.ops.ddp_ssl.sum_statistics(every)
    return every


def _mean_and_inverse(statistics: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation in float64, from mean and variance `[views, 2 C]`."""
    mean, variance = statistics.double().chunk(2, 1)
    return mean, (variance + eps).rsqrt()


class _Normalize(torch.autograd.Function):
    """Normalise each view by its statistics, in torch's generic operators.

    For a CPU, and for `torch.compile` on any device. With `reduce` the statistics are those of all
    processes, which hold as many images each, in one all-reduce forward and one backward; otherwise
    this process's own. Returns the output and, for the running averages, means and variances
    `[total, 2 C]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        layout: ViewLayout,
        reduce: bool,
    ) -> tuple[Tensor, Tensor]:
        channels, views = x.shape[1], layout.local
        held = layout.held if reduce else slice(None)
        x = x.contiguous(memory_format=_format(x))
        rows, dims, shape = _by_view(x, views)
        work = rows.to(torch.promote_types(x.dtype, torch.float32))
        number = _number(x, layout, reduce)
        # Local mean and variance in the working precision, combined in float64. So a large mean
        # cancels nothing, and one all-reduce is enough.
        if torch.compiler.is_compiling():  # `x` is read once, where a CPU's cache serves twice
            variance, mean = torch.var_mean(work, dims, correction=0)
        else:
            mean = work.mean(dims)
            variance = (work - mean.view(shape)).square_().mean(dims)
        mean, share = mean.double(), rows.numel() / (views * channels * number)
        own = torch.cat([share * mean, share * (variance.double() + mean.square())], 1)
        moments = _total(own, layout, reduce)

        mean, square = moments.chunk(2, 1)
        variance = (square - mean.square()).clamp_(min=0)
        kind = work.dtype
        statistics = torch.cat([mean.to(kind), variance.to(kind)], 1)

        mean, inverse = _mean_and_inverse(statistics[held], eps)
        scale = inverse * weight.double()
        shift = bias.double() - mean * scale
        out = _affine(x, views, work, scale.to(kind).view(shape), shift.to(kind).view(shape))
        ctx.save_for_backward(x, weight, statistics)
        ctx.eps, ctx.layout, ctx.reduce, ctx.held, ctx.number = eps, layout, reduce, held, number
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        mean, inverse = _mean_and_inverse(statistics[ctx.held], ctx.eps)
        views = len(mean)
        grad = grads[0]
        assert grad is not None
        grad = grad.contiguous(memory_format=_format(x))
        rows, dims, shape = _by_view(x, views)
        kind = torch.promote_types(x.dtype, torch.float32)
        work = rows.to(kind)
        grad_rows = _by_view(grad, views)[0].to(kind)
        sum_grad = grad_rows.sum(dims).double()
        centred = (work - mean.to(kind).view(shape)).mul_(grad_rows)
        sum_grad_x = centred.sum(dims).double() * inverse

        own = torch.cat([sum_grad, sum_grad_x], 1)
        # DDP averages the ranks' parts to the affine parameters.
        of_bias, of_weight = own.sum(0).to(weight.dtype).view(2, -1).unbind()
        sums = _total(own, ctx.layout, ctx.reduce)
        mean_grad, mean_grad_x = (sums[ctx.held] / ctx.number).chunk(2, 1)
        # dx = w/s (g - mean g - x^ mean(g x^)) is one affine map of g and x per channel.
        scale = inverse * weight.double()
        slope = -scale * inverse * mean_grad_x
        offset = -scale * mean_grad - mean * slope
        offset_rows = torch.addcmul(
            offset.to(kind).view(shape), grad_rows, scale.to(kind).view(shape)
        )
        return (
            _affine(x, views, work, slope.to(kind).view(shape), offset_rows),
            of_weight,
            of_bias,
            None,
            None,
            None,
        )


class _Statistics(NamedTuple):
    """Statistics `[C]` of each view over `number` values, as the norm has them at hand.

    Beside the mean: the variance, or the inverse standard deviation.
    """

    norm: "GlobalBatchNorm"
    means: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    number: int
    inverse: bool


def _counts(rows: int, processes: int) -> tuple[int, int]:
    """A number of 32 bits, and how many of it the backward kernel sums to the count of all rows."""
    every = rows * processes
    return (every, 1) if every < 2**31 else (rows, processes)


class _NormalizeOnGPU(torch.autograd.Function):
    """The same with the kernels that `nn.SyncBatchNorm` uses. Each view is a slice of the batch.

    Each layer gathers once for all views in forward and all-reduces once in backward. Without
    `reduce` it does neither: the statistics are this process's own. The kernels take a row of
    statistics of any length, so one call merges all views.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: "GlobalBatchNorm",
        layout: ViewLayout,
        reduce: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=_format(x))
        local, channels, eps = layout.local, x.shape[1], norm.eps
        total, held = (layout.total, layout.held) if reduce else (local, slice(None))
        number = _number(x, layout, reduce)
        views = x.chunk(local)
        rows = views[0].numel() // channels
        own = [torch.batch_norm_stats(view, eps) for view in views]
        packed = torch.cat([part for kind in zip(*own, strict=True) for part in kind])[None]
        if reduce:
            gathered = packed.new_empty(dist.get_world_size(), packed.shape[1])
            run_collective("norm", all_gather_single, gathered, packed)
            packed = gathered
            if total > local:  # [data shard, view shard, kind, view, C]: view shards into the row
                apart = packed.view(-1, total // local, 2, local, channels)
                packed = apart.permute(0, 2, 3, 1, 4).reshape(len(apart), -1)
        half = total * channels
        counts = norm.constant(rows, len(packed), packed)
        merged = torch.batch_norm_gather_stats_with_counts(
            counts, packed[:, :half], packed[:, half:], None, None, 0.0, eps, counts
        )
        means, inverses = (kind.view(total, channels).unbind() for kind in merged)
        norm.saw(_Statistics(norm, means, inverses, number, True))
        out = torch.empty_like(x)
        ours = zip(views, out.chunk(local), means[held], inverses[held], strict=True)
        for view, part, mean, inverse in ours:
            torch.batch_norm_elemt(view, weight, bias, mean, inverse, eps, out=part)
        counts = norm.constant(*_counts(rows, len(packed)), packed, torch.int32)
        ctx.save_for_backward(x, weight, counts, *means[held], *inverses[held])
        ctx.local, ctx.total, ctx.held, ctx.reduce = local, total, held, reduce
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, counts, *statistics = ctx.saved_tensors
        local, total, channels = ctx.local, ctx.total, x.shape[1]
        affine = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad = grads[0].contiguous(memory_format=_format(x))
        means, inverses = statistics[:local], statistics[local:]
        held = list(zip(grad.chunk(local), x.chunk(local), means, inverses, strict=True))
        # For each view held: sums of g and of g (x - mean), gradients of weight and of bias.
        parts = [
            torch.batch_norm_backward_reduce(*one, weight, True, affine, affine) for one in held
        ]
        kinds = [kind for kind in zip(*parts, strict=True) if kind[0] is not None]
        packed = torch.cat([part for kind in kinds for part in kind]).view(-1, local, channels)
        sums = packed[:2]
        if ctx.reduce:
            gathered = sums
            if total > local:  # the others hold other views
                gathered = sums.new_zeros(2, total, channels)
                gathered[:, ctx.held] = sums
            run_collective("norm", dist.all_reduce, gathered)
            sums = gathered[:, ctx.held] if total > local else sums
        dx = None
        if ctx.needs_input_grad[0]:
            rows = sums.flatten(0, 1).unbind()
            each = zip(held, rows[:local], rows[local:], strict=True)
            apart = [
                torch.batch_norm_backward_elemt(*one, weight, first, second, counts)
                for one, first, second in each
            ]
            dx = torch.cat(apart) if local > 1 else apart[0]
        # DDP averages the ranks' parts to the affine parameters.
        own = packed[2:].sum(1).unbind() if affine else (None, None)
        return dx, *own, None, None, None


@torch.no_grad()
def _update_averages(seen: "dict[GlobalBatchNorm, _Statistics] | None") -> None:
    """Update the running averages of all layers together, in view order, and empty `seen`."""
    alike: dict[Any, list[_Statistics]] = {}
    for one in (seen or {}).values():
        if one.norm.running_mean is not None:
            alike.setdefault((one.norm.momentum, len(one.means), one.inverse), []).append(one)
    if seen:
        seen.clear()
    for (momentum, views, inverse), group in alike.items():
        variances: Any = [other for one in group for other in one.others]
        if inverse:
            variances = torch._foreach_pow(variances, -2)
            torch._foreach_sub_(variances, [one.norm.eps for one in group for _ in range(views)])
        scales = [one.number / max(one.number - 1, 1) for one in group for _ in range(views)]
        variances = torch._foreach_mul(variances, scales)  # unbiased
        counts = [cast(Tensor, one.norm.num_batches_tracked) for one in group]
        averages = [cast(Tensor, one.norm.running_mean) for one in group]
        averages += [cast(Tensor, one.norm.running_var) for one in group]
        for view in range(views):
            torch._foreach_add_(counts, 1)
            new = [one.means[view] for one in group] + list(variances[view::views])
            if new[0].dtype != averages[0].dtype:
                new = [value.to(averages[0].dtype) for value in new]
            if momentum is not None:
                torch._foreach_lerp_(averages, new, momentum)
                continue
            for average, value, count in zip(averages, new, counts * 2, strict=True):
                average.lerp_(value, count.to(average.dtype).reciprocal())


def _number(x: Tensor, layout: ViewLayout, reduce: bool) -> int:
    """Values of a channel over all processes, from which one view's statistics are computed."""
    if len(x) % layout.local:
        raise ValueError(f"{len(x)} images are not {layout.local} views of as many images each")
    shards = dist.get_world_size() * layout.local // layout.total if reduce else 1
    number = x.numel() // (x.shape[1] * layout.local) * shards
    if number == 1:
        raise ValueError(f"expected more than one value per channel, got {tuple(x.shape)}")
    return number


def _has_kernels(x: Tensor) -> bool:
    """Whether torch has the kernels of a synchronised batch norm for this tensor's device."""
    return x.is_cuda


class GlobalBatchNorm(_BatchNorm):
    """Batch normalisation over the global batch, per view or pooled, on CPU and GPU.

    The result equals that of `nn.SyncBatchNorm` called once per view, with one collective for all
    views. State dict and attributes are those of `nn.BatchNorm2d`, so weights move freely between
    the two. With `reduce=False` the statistics are this process's own. All processes must hold the
    same number of images.
    """

    def __init__(self, like: _BatchNorm, layout: ViewLayout, reduce: bool) -> None:
        super().__init__(
            like.num_features,
            like.eps,
            like.momentum,
            like.affine,
            like.track_running_stats,
            dtype=like.running_mean.dtype if like.running_mean is not None else None,
        )
        self.load_state_dict(like.state_dict())
        for own, theirs in zip(self.parameters(), like.parameters(), strict=True):
            own.requires_grad_(theirs.requires_grad)
        self.layout, self.reduce = layout, reduce
        # timm's fused norm layers apply an activation after the norm.
        self.after = nn.Sequential(
            *(m for m in (getattr(like, "drop", None), getattr(like, "act", None)) if m is not None)
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [n, C, ...], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        reduce = self.reduce and dist.is_initialized()
        # Pooled views of a local norm are a plain batch: torch's norm has fewer operators.
        kernels = _has_kernels(input) and (self.reduce or self.layout.local > 1)
        if not self.training:
            out = super().forward(input)
        elif not (reduce or kernels or torch.compiler.is_compiling()):
            out = self._local(input)
        else:
            out = self._global(input, reduce)
        return cast(Tensor, self.after(out))

    def _global(self, input: Tensor, reduce: bool) -> Tensor:
        """Normalise each view by the statistics of all processes."""
        layout = ViewLayout(self.layout.total, self.layout.held)
        if _has_kernels(input) and not torch.compiler.is_compiling():
            affine = (self.weight, self.bias) if self.affine else (None, None)
            return cast(Tensor, _NormalizeOnGPU.apply(input, *affine, self, layout, reduce))
        weight = self.weight if self.affine else input.new_ones(self.num_features)
        bias = self.bias if self.affine else input.new_zeros(self.num_features)
        out, statistics = cast(
            tuple[Tensor, Tensor],
            _Normalize.apply(input, weight, bias, self.eps, layout, reduce),
        )
        means, variances = statistics.chunk(2, 1)
        number = _number(input, layout, reduce)
        self.saw(_Statistics(self, means.unbind(), variances.unbind(), number, False))
        return out

    def saw(self, one: _Statistics) -> None:
        """Update the running averages: at once, or at the end of `stacked_views` for all layers.

        A layer that is used twice in one context is updated after its first use.
        """
        seen = {} if self.layout.statistics is None else self.layout.statistics
        if self in seen:
            _update_averages(seen)
        seen[self] = one
        if seen is not self.layout.statistics:
            _update_averages(seen)

    def constant(
        self, value: int, count: int, like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor of `count` times `value`, cached: to make it in every step costs host time."""
        key = (value, count, dtype or like.dtype, like.device)
        constants = self.layout.constants
        if key not in constants:
            with torch.inference_mode(False):
                constants[key] = torch.full((count,), value, dtype=key[2], device=key[3])
        return constants[key]

    def _local(self, input: Tensor) -> Tensor:
        """Normalise each view held here by this process's own statistics, with torch's kernels."""
        if self.layout.local == 1:
            return super().forward(input)
        views = input.chunk(self.layout.local)
        return torch.cat([super(GlobalBatchNorm, self).forward(view) for view in views])


def global_batch_norm(module: nn.Module, layout: ViewLayout, reduce: bool = True) -> nn.Module:
    """`module` with every batch norm replaced by `GlobalBatchNorm`, weights kept."""
    if isinstance(module, _BatchNorm):
        return GlobalBatchNorm(module, layout, reduce)
    for name, child in list(module.named_children()):
        setattr(module, name, global_batch_norm(child, layout, reduce))
    return module
