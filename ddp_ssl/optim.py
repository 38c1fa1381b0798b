"""Optimisers, parameter groups, and the learning rate as a pure function of the step.

Every process sees the same averaged gradient, so nothing here communicates. Nothing here waits for
the device: a step only launches work.
"""

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ddp_ssl.config import Optim
from ddp_ssl.errors import ConfigError, refused

Variant = Literal["solo", "vicreg"]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose direction is scaled per tensor by a trust ratio q.

    With parameter p, gradient g, weight decay w (You, Gitman & Ginsburg 2017), as implemented in

        solo    q = eta |p| / (|g| + w |p| + eps), with `clip` min(q / lr, 1);
                d = q (g + w p), and d = g where |p| or |g| is 0             (solo-learn)
        vicreg  q = eta |p| / |g + w p|, and 1 where one of the two is 0;
                d = q (g + w p)                                              (official VICReg)

    then buf <- momentum buf + d (at first buf = d) and p <- p - lr buf.

    1-D parameters (biases, norms) are neither adapted nor decayed: d = g. With `bound_1d` their buf
    is scaled down so that a step moves no element further than that. The trust ratio bounds a
    matrix's step, but nothing else bounds theirs: a steep gradient moves the norms' scales far in
    one step, which makes the next gradient steeper, and in a few steps all is NaN.

    Parameters without gradient are skipped. A step overwrites the gradients.

    `params` as in any torch optimiser, (name, parameter) pairs included. A group may have its own
    value of every option. Raises `ValueError` for another variant and for a bound that is not
    above 0.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.02,
        clip: bool = True,
        variant: Variant = "solo",
        eps: float = 1e-8,
        bound_1d: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "clip": clip,
            "variant": variant,
            "eps": eps,
            "bound_1d": bound_1d,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that have options of their own; those left out are the constructor's."""
        options = self.defaults | param_group
        variant, bound = options["variant"], options["bound_1d"]
        if variant not in ("solo", "vicreg"):
            raise ValueError(f"variant: expected solo or vicreg, got {variant!r}")
        if bound is not None and not bound > 0:
            raise ValueError(f"bound_1d: expected None or a number above 0, got {bound!r}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns what `closure` returns, if there is one."""
        loss = _evaluated(closure)
        for tensors in _chunks(self._trained()):
            deep = [t for t in tensors if not is_one_dimensional(t.p)]
            flat = [t for t in tensors if is_one_dimensional(t.p)]
            ratios = _trust_ratios(deep) if deep else None
            torch._foreach_mul_([t.buffer for t in tensors], tensors[0].group["momentum"])
            if ratios is not None:
                gradients = [t.gradient for t in deep]
                factors = _alike(ratios, gradients)
                torch._foreach_addcmul_([t.buffer for t in deep], gradients, factors)
            if flat:
                torch._foreach_add_([t.buffer for t in flat], [t.gradient for t in flat])
                _bound(flat)
            _add((t.p, t.buffer, -t.group["lr"]) for t in tensors)
        return loss

    def _trained(self) -> Iterator["_Trained"]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:  # a zero buffer makes the first one d
                        state["momentum_buffer"] = torch.zeros_like(p)
                    yield _Trained(p, p.grad, state["momentum_buffer"], group)


class _Trained(NamedTuple):
    """A parameter that `LARS` moves."""

    p: Tensor
    gradient: Tensor
    buffer: Tensor
    group: dict[str, Any]


def _bound(tensors: list[_Trained]) -> None:
    """Scale the buffers of a chunk down so that no element moves further than `bound_1d`."""
    bound = tensors[0].group["bound_1d"]
    if bound is not None:
        buffers = [t.buffer for t in tensors]
        largest = torch.stack(torch._foreach_norm(buffers, math.inf))
        torch._foreach_mul_(list(largest.unbind()), [t.group["lr"] / bound for t in tensors])
        torch._foreach_div_(buffers, _alike(largest.clamp_(min=1), buffers))


def _trust_ratios(tensors: list[_Trained]) -> Tensor:
    """q, `[len(tensors)]`, of a chunk; overwrites the gradients with g + w p.

    Norms stay on the device, so zeros are found there.
    """
    shared = tensors[0].group
    solo, eta = shared["variant"] == "solo", shared["eta"]
    decays = [t.group["weight_decay"] for t in tensors]
    params, gradients = [t.p for t in tensors], [t.gradient for t in tensors]
    if not solo:
        _add(zip(gradients, params, decays, strict=True))
    norms = torch.stack(torch._foreach_norm(params + gradients)).view(2, -1)
    (above, below), (no_p, no_g) = norms.unbind(), (norms == 0).unbind()
    if solo:
        _add(zip(gradients, params, decays, strict=True))
        _add(zip(below.unbind(), above.unbind(), decays, strict=True))
        below.add_(shared["eps"])
    if solo and shared["clip"]:
        # As lr -> 0 the quotient grows without bound, so its minimum with 1 is 1.
        rates = [t.group["lr"] for t in tensors]
        etas = [eta / lr if lr > 0 else math.inf for lr in rates]
        torch._foreach_mul_(list(above.unbind()), etas)
        q = above.div_(below).clamp_(max=1)
    else:
        q = above.mul_(eta).div_(below)
    # Where p = 0, g + w p is g. Where g = 0, the factor 0 removes w p.
    return q.masked_fill_(no_p, 1).masked_fill_(no_g, 0)


def _add(terms: Iterable[tuple[Tensor, Tensor, float]]) -> None:
    """x <- x + factor y for each (x, y, factor): a launch for each factor that is not 0."""
    alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for x, y, factor in terms:
        xs, ys = alike.setdefault(factor, ([], []))
        xs.append(x)
        ys.append(y)
    for factor, (xs, ys) in alike.items():
        if factor != 0:
            torch._foreach_add_(xs, ys, alpha=factor)


def _alike(factors: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """One of `factors` `[len(tensors)]` for each tensor, as foreach functions take them."""
    return list(factors.unbind()) if factors.is_cpu else _expanded(factors, tensors)


def _expanded(factors: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """`factors` in the tensors' own shapes and strides, which one kernel for all needs."""
    index, starts = _blocks(tuple(t.numel() for t in tensors), factors.device)
    every = factors.unsqueeze(1).expand(-1, BLOCK).index_select(0, index)
    return [
        every.as_strided(t.shape, t.stride(), start) if _is_dense(t) else factor.expand(t.shape)
        for t, start, factor in zip(tensors, starts, factors.unbind(), strict=True)
    ]


def _is_dense(t: Tensor) -> bool:
    """Whether the elements lie side by side, as those of parameters and DDP's gradients do."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.numel() == span or not t.numel()


BLOCK = 1024
"""Elements of a block in which factors are expanded; every tensor begins a new block."""


@functools.lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int]]:
    """The tensor that each block belongs to, and the element at which each tensor begins.

    Both are the same at every step.
    """
    index, starts = list[int](), list[int]()
    for place, size in enumerate(sizes):
        starts.append(len(index) * BLOCK)
        index += [place] * -(-size // BLOCK)
    return torch.tensor(index, dtype=torch.long).to(device, non_blocking=True), starts


# Elements updated at once: on a CPU as many as its caches hold; on a GPU many more. There the
# factors that `_expanded` makes take 512 MiB at most, unless one tensor is larger.
AT_ONCE = {"cpu": 2**18, "cuda": 2**27}

_shared_options = operator.itemgetter("momentum", "eta", "clip", "variant", "eps", "bound_1d")


def _chunks(tensors: Iterable[_Trained]) -> list[list[_Trained]]:
    """Tensors that are updated at once: of one device, and equal but in `lr` and `weight_decay`."""
    chunks: list[list[_Trained]] = []
    room, last = 0, None
    for t in tensors:
        alike = t.p.device, _shared_options(t.group)
        if alike != last or t.p.numel() > room:
            chunks.append([])
            room = AT_ONCE.get(t.p.device.type, 2**24)
        chunks[-1].append(t)
        room, last = room - t.p.numel(), alike
    return chunks


def _evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss that `closure` computes, with gradients; what an optimiser's step returns."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def is_one_dimensional(parameter: Tensor) -> bool:
    """Whether a parameter is a bias or belongs to a norm: no adaptation, no weight decay."""
    return parameter.ndim == 1


def build(
    config: Optim, groups: Sequence[Mapping[str, Any]], backbone: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The configured optimiser over named groups of parameters.

    A group has `name`, `params` (pairs of name and parameter) and, where they differ from the
    config's, `base_lr` (per 256 images), `weight_decay`, and `schedule: False` for a constant rate
    without warm-up (SimSiam's predictor). Some of a group's parameters get a group of their own:
    `NAME/1d` the 1-D ones, without weight decay, with the tokens and position embeddings that the
    timm model `backbone` names (SGD decays all of them, as solo-learn does); `NAME/muon` Muon's
    matrices, if the group has no rate of its own; `.../xRATE` those whose rate `optim.layer_decay`
    scales.

    Raises `ValueError` if two parameters have one name, since state is stored by name.
    """
    scales, spared = dict[Tensor, float](), set[Tensor]()
    if backbone is not None:
        scales, spared = layer_scales(backbone, config.layer_decay), undecayed(backbone)

    def kind(p: Tensor, group: Mapping[str, Any]) -> str:
        if config.name != "sgd" and (is_one_dimensional(p) or p in spared):
            return "/1d"
        return "/muon" if config.name == "muon" and p.ndim == 2 and "base_lr" not in group else ""

    options: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[tuple[float, str], list[tuple[str, Tensor]]] = {}
        for name, p in group["params"]:
            parts.setdefault((-scales.get(p, 1.0), kind(p, group)), []).append((name, p))
        for (scale, own), params in sorted(parts.items(), key=lambda part: part[0]):
            flat = own == "/1d"
            options.append({
                "name": f"{group['name']}{own}" + ("" if scale == -1 else f"/x{-scale:.3g}"),
                "params": params,
                "weight_decay": 0.0 if flat else group.get("weight_decay", config.weight_decay),
                "decay_schedule": not flat and "weight_decay" not in group,
                "base_lr": group.get("base_lr", config.lr),
                "scale": -scale,
                "schedule": group.get("schedule", True),
            })  # fmt: skip
    names = Counter(name for group in options for name, _ in group["params"])
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"parameter groups: the name {twice[0]} is given twice")

    if config.name == "lars":
        return LARS(
            options,
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            eta=config.lars_eta,
            clip=config.lars_clip,
            variant=config.lars_variant,
            bound_1d=config.lars_bound_1d,
        )
    if config.name == "sgd":
        return torch.optim.SGD(options, config.lr, momentum=config.momentum, foreach=True)
    if config.name == "muon":
        return MuonAdamW(options, config)
    adam = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    # On a GPU one kernel for all tensors, which leaves out a step of infinite gradients by itself.
    fused = _on_gpu([p for group in options for _, p in group["params"]])
    return adam(options, config.lr, betas=config.betas, fused=fused, foreach=not fused)


def _on_gpu(parameters: Sequence[Tensor]) -> bool:
    return all(p.is_cuda for p in parameters)


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups `NAME/muon`, AdamW for the others (Jordan 2024).

    Muon's updates have the size of AdamW's (0.2 in the root mean square, Liu et al. 2025), so that
    one rate and one weight decay serve both. Newton-Schulz runs in bf16 whatever the matrix is, on
    every process alike. Raises `ConfigError` where torch has no Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], config: Optim) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"optim.name: torch {torch.__version__} has no muon; adamw, or torch 2.9 or later "
                "would be accepted"
            )
        matrices = [group for group in groups if "/muon" in group["name"]]
        others = [group for group in groups if "/muon" not in group["name"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices, config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"
                )
            )
        if others:
            fused = _on_gpu([p for group in others for _, p in group["params"]])
            self.parts.append(torch.optim.AdamW(others, config.lr, betas=config.betas, fused=fused))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns what `closure` returns, if there is one."""
        loss = _evaluated(closure)
        for part in self.parts:
            part.step()
        return loss


def undecayed(backbone: nn.Module) -> set[Tensor]:
    """The tokens and position embeddings that timm's model names as parameters without decay."""
    names: set[str] = getattr(backbone, "no_weight_decay", set)()
    return {p for name, p in backbone.named_parameters() if name in names}


def layer_scales(backbone: nn.Module, decay: float | None) -> dict[Tensor, float]:
    """Factor of each parameter's rate, `decay ** (L - l)`: 1 for the last of timm's L layers.

    For a ViT layer 0 makes the tokens, and layer L is the last block with the norm after it. What
    timm gives a model after that norm, such as the `fc_norm` of pooled tokens, is layer L, and the
    last block is L - 1; BEiT (Bao et al. 2021) counts every model's norm so.
    Raises `ValueError` for a model whose layers have no order.
    """
    if decay is None:
        return {}
    from timm.models import group_parameters

    what = f"layer_decay: {type(backbone).__name__} has no order of layers"
    with refused(what, "null is accepted"):
        matcher = backbone.group_matcher(coarse=False)  # type: ignore[operator]
        layers = group_parameters(backbone, matcher, reverse=True)
    last = max(layers.values())
    return {p: decay ** (last - layers[name]) for name, p in backbone.named_parameters()}


def cosine(first: float, last: float, step: int, total_steps: int) -> float:
    """`last - (last - first) (cos(pi t / T) + 1) / 2`, a function of the step alone."""
    return last - (last - first) * (math.cos(math.pi * step / total_steps) + 1) / 2


def learning_rate(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    warmup_start: float,
    final_fraction: float,
) -> float:
    """Rate of a step, counted from 0: linear from `warmup_start` to `peak`, then a cosine.

    It is the peak at `step == warmup_steps` and `final_fraction * peak` at `total_steps`, the
    first step that is not taken. A warm-up longer than the run is clipped to it.
    """
    warmup_steps = min(warmup_steps, total_steps)
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / warmup_steps
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return peak * (final_fraction + (1 - final_fraction) * cosine)


def set_learning_rates(
    optimizer: torch.optim.Optimizer,
    config: Optim,
    global_batch: int,
    step: int,
    steps_per_epoch: int,
) -> float:
    """Write every group's rate for `step`, scaled by `global_batch` / 256; returns the first's.

    The weight decay follows where it has a schedule. Both depend on the step alone, so there is
    nothing to checkpoint.
    """
    total_steps = config.epochs * steps_per_epoch
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    for group in optimizer.param_groups:
        rate = peak = group["base_lr"] * global_batch / 256
        if group["schedule"]:
            rate = learning_rate(
                step, total_steps, warmup_steps, peak, config.warmup_lr, config.final_lr_fraction
            )
        group["lr"] = group["scale"] * rate
        if group["decay_schedule"] and config.final_weight_decay is not None:
            group["weight_decay"] = cosine(
                config.weight_decay, config.final_weight_decay, step, total_steps
            )
    return float(optimizer.param_groups[0]["lr"])


def state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor | int]]:
    """Parameter name -> its state (momentum, Adam's averages and step).

    The keys are names, so that adding or removing the probe shifts nothing. The tensors are the
    optimiser's own, not copies.
    """
    return {
        name: {key: value for key, value in optimizer.state[p].items() if value is not None}
        for name, p in _named(optimizer)
        if p in optimizer.state
    }


def load_state_by_name(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor | int]]
) -> list[str]:
    """Load the result of `state_by_name`; returns the parameters without stored state.

    Those start anew. State of parameters that do not exist is ignored. Raises `ValueError` with the
    parameter's name where a tensor has another shape.
    """
    missing: list[str] = []
    # Adam's kernels without `fused` read the step on the host, once for each tensor.
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for name, p in _named(optimizer):
        optimizer.state.pop(p, None)
        if name in state:
            optimizer.state[p] = {
                key: value.detach().to(p.device if p in fused else "cpu", copy=True)
                if key == "step" and isinstance(value, Tensor)
                else _placed(value, p, f"{name}: {key}")
                for key, value in state[name].items()
            }
        else:
            missing.append(name)
    return missing


def _placed(value: Tensor | int, p: Tensor, what: str) -> Tensor | int:
    """A copy of a state tensor with its parameter's device, type and memory format."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != p.shape:
        raise ValueError(
            f"optimizer state of {what} is {list(value.shape)}, expected {list(p.shape)}"
        )
    return torch.empty_like(p, requires_grad=False).copy_(value)


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ]
