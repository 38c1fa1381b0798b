"""Whether a loss on several processes is the loss of one process with the whole batch.

Every process calls `measure` at each world size, on its own part of one fixed batch. `judge`
compares the mean over processes with the result of one process, value and gradient.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ddp_ssl import distributed
from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.data.batch import Batch
from ddp_ssl.errors import ConfigError, refused
from ddp_ssl.methods._registry import load_method, make_method
from ddp_ssl.methods.base import Context, Method
from ddp_ssl.run.configure import load
from ddp_ssl.utils.text import one_line

SIZES = (1, 2, 3, 4)
TIMEOUT_S = 60.0  # of a collective that another process does not reach
FLOOR = 1e-3  # a number that is smaller is compared as if it had this size
EXACT = "exact"

Shape = tuple[int, int, int]
Gradients = dict[str, npt.NDArray[np.float64]]
Subject = Callable[[slice, Comm], tuple[Tensor, Mapping[str, Tensor]]]
"""The loss of some images of the batch, and the tensors that have its gradient afterwards."""


class Result(NamedTuple):
    """A loss and its gradient by the name of what it is the gradient of."""

    value: float
    gradients: Gradients


@dataclass(frozen=True)
class Measured:
    """What a process found: its loss in two calls, and how exact its type is."""

    first: Result
    second: Result
    tolerance: float
    local: dict[int, Result] = field(default_factory=dict)
    """In a group of one: for each world size the mean of the losses of the parts alone."""


@dataclass(frozen=True)
class Failed:
    """A process could not measure. `differ`: because the others called other collectives."""

    text: str
    differ: bool


# --- in every process ----------------------------------------------------------------------------


def measure(
    target: str,
    shape: Shape,
    settings: Sequence[str] = (),
    meet: Callable[[bool], bool] = lambda ready: ready,
) -> Measured | Failed:
    """The loss and gradient of this process's part, in a group of its own for this call.

    `target`: `module:callable`, or a method, which gets the `key=value` in `settings`. `shape`:
    K views of N images, and the width d of the embeddings. The launcher's variables say which
    process this is. `meet` waits for all processes, says them whether this one is ready, and
    returns whether all are; the others may still be at work on another world size.
    """
    subject, failed = None, None
    try:
        subject = _subject(target, shape, settings)  # before the group: imports take their time
    except (Exception, SystemExit) as error:
        failed = Failed(_text(error), False)
    together = meet(failed is None)
    if subject is None or not together:
        return failed or Failed("another process could not load it", True)
    try:
        world = distributed.start("cpu", TIMEOUT_S, checked=True)
    except Exception as error:
        return Failed(_text(error), False)
    try:
        comm = distributed.comm_of(world)
        rows = comm.rows(shape[1] // world.size)
        try:
            first, tolerance = _evaluate(subject, rows, comm)
            second, _ = _evaluate(subject, rows, comm)
            local = _local(subject, shape[1]) if world.size == 1 else {}
        except (Exception, SystemExit) as error:
            differ = "mismatch between collectives" in str(error)
            differ = differ or distributed.others_failed(error)
            failed = Failed(_text(error), world.size > 1 and differ)
        if failed is None or not failed.differ:
            try:
                # Others may be in a collective that this process has not called. No loss is likely
                # to call one of this shape, so torch finds that they differ, and nobody waits.
                world.mean_rows(torch.zeros(3, 1, 7))
            except RuntimeError as error:
                failed = failed or Failed(_text(error), True)
        return failed or Measured(first, second, tolerance, local)
    finally:
        distributed.stop()


def _text(error: BaseException) -> str:
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    return kind + one_line(error, 300)


def _local(subject: Subject, images: int) -> dict[int, Result]:
    """For each world size, the mean over the parts of the batch, each by itself.

    A loss that takes no parts, such as one with more clusters than a part has images, has none.
    """
    found = {}
    for size in SIZES[1:]:
        n = images // size
        parts = [slice(r * n, (r + 1) * n) for r in range(size)]
        with contextlib.suppress(Exception):
            found[size] = _mean([_evaluate(subject, part, ONE_PROCESS)[0] for part in parts])
    return found


def _evaluate(subject: Subject, rows: slice, comm: Comm) -> tuple[Result, float]:
    """The loss and its gradient, and the relative error that its type explains."""
    with torch.random.fork_rng(devices=[]):
        loss, tensors = subject(rows, comm)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        raise ConfigError(f"returned {_kind(loss)}; a scalar tensor, or `.loss`, is accepted")
    if not loss.requires_grad:
        raise ConfigError("returned a loss that has no gradient")
    torch.autograd.backward(loss)
    gradients = {
        name: np.zeros(x.shape) if x.grad is None else x.grad.double().numpy()
        for name, x in tensors.items()
    }
    return Result(float(loss.detach()), gradients), math.sqrt(torch.finfo(loss.dtype).eps)


def _kind(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _subject(target: str, shape: Shape, settings: Sequence[str]) -> Subject:
    torch.manual_seed(0)  # a module may draw its parameters when it is imported
    found = load_method(target) if ":" not in target else _import(target)
    if isinstance(found, type) and issubclass(found, Method):
        return _method(target, shape, settings)
    return _loss(found, shape)


def _import(target: str) -> Any:
    module, _, name = target.partition(":")
    with refused("cannot be imported"):
        return getattr(importlib.import_module(module), name)


def _loss(given: Any, shape: Shape) -> Subject:
    """A function, a module, or a module's class, of `[K, N, d]` or of two views `[N, d]`."""
    z = _random(*shape)
    if not callable(given):
        raise ConfigError(f"is {type(given).__name__}; a function or an nn.Module is accepted")

    def evaluate(rows: slice, comm: Comm) -> tuple[Tensor, Mapping[str, Tensor]]:
        # Every call begins anew, so that a module's state is no difference.
        torch.manual_seed(0)
        loss = given() if isinstance(given, type) else copy.deepcopy(given)
        parameters: dict[str, Tensor] = {}
        if isinstance(loss, nn.Module):
            loss.double()
            parameters = {f"parameter {n}": p for n, p in loss.named_parameters()}
        whole = z.clone().requires_grad_()
        mine = whole[:, rows].clone()
        views, options = _arguments(loss, mine, comm)
        torch.seed()  # a loss that draws random numbers shows it
        out = loss(*views, **options)
        return getattr(out, "loss", out), {"embeddings": whole} | parameters

    return evaluate


def _arguments(loss: Any, z: Tensor, comm: Comm) -> tuple[list[Tensor], dict[str, Comm]]:
    """The arguments of a loss: its views, and this project's `comm` if it has one."""
    parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    needed = [
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.default is p.empty
        and name != "comm"
    ]
    options = {"comm": comm} if "comm" in parameters else {}
    if len(needed) == 1:
        return [z], options
    if len(needed) != 2:
        raise ConfigError(
            f"has {len(needed)} positional parameters without a default; one ([K, N, d]) or two "
            "(two views [N, d]) are accepted"
        )
    if len(z) != 2:
        raise ConfigError(f"takes two views; --shape 2,N,d is accepted, got {len(z)} views")
    return [z[0], z[1]], options


def _method(name: str, shape: Shape, settings: Sequence[str]) -> Subject:
    """A step of a method on random images, with a small ResNet."""
    views, images, width = shape
    config = load(
        [
            f"method.name={name}", f"data.batch_size={images}",
            f"data.views=[{{count: {views}, size: 16, recipe: sym}}]",
            f"model.projector=[{2 * width}, {width}]", "run.device=cpu",
            "model.backbone_args={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}", *settings,
        ]
    ).config  # fmt: skip
    x, ids = _random(views, images, 3, 16, 16), torch.arange(images)

    def evaluate(rows: slice, comm: Comm) -> tuple[Tensor, Mapping[str, Tensor]]:
        torch.manual_seed(0)
        method = make_method(config, comm).double().train()

        def batches(count: int, purpose: str) -> Iterator[Batch]:
            yield Batch([x[0, rows]], ids[rows], ids[rows] % 3)

        method.on_start(Context(comm, 0, 0, 4, batches, lambda _: None, lambda _: None))
        out = method(Batch(list(x[:, rows]), ids[rows], ids[rows] % 3))
        return out.loss, dict(method.named_parameters())

    return evaluate


def _random(views: int, images: int, *rest: int) -> Tensor:
    """Views of images that differ from image to image in scale, so that no two parts are alike."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(images, *rest, generator=generator, dtype=torch.float64)
    own = torch.randn(views, images, *rest, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, images, dtype=torch.float64)
    return (common + 0.5 * own) * scale.view(-1, *(1 for _ in rest)) + 0.3


# --- the judgement -------------------------------------------------------------------------------


def judge(found: Mapping[int, Sequence[Measured | Failed]]) -> tuple[list[str], str]:
    """Lines about each world size, and the verdict.

    `found`: what the processes of each world size measured, that of 1 included. Raises
    `ConfigError` where the loss itself cannot be used.
    """
    for size, results in found.items():
        for rank, result in enumerate(results):
            if isinstance(result, Failed) and not result.differ:
                raise ConfigError(f"{result.text} [W = {size}, rank {rank}]")
    for size, results in found.items():
        for result in results:
            if isinstance(result, Failed):
                return [f"W = {size}: {result.text}"], "collectives differ"
    whole = {
        size: [r for r in results if isinstance(r, Measured)] for size, results in found.items()
    }
    one = whole[1][0]
    reference, tolerance = one.first, one.tolerance
    finite = [np.isfinite(gradient).all() for gradient in reference.gradients.values()]
    if not (math.isfinite(reference.value) and all(finite)):
        raise ConfigError("value or gradient is not finite in one process; try another --shape")
    lines = [f"W = 1: value {reference.value:.10g}"]
    means: dict[int, Result] = {}
    for size in SIZES[1:]:
        means[size] = _mean([r.first for r in whole[size]])
        lines.append(_line(size, means[size], reference))
    steady = all(_same(r.first, r.second, tolerance) for results in whole.values() for r in results)
    return lines, _word(steady, means, one)


def _word(steady: bool, means: Mapping[int, Result], one: Measured) -> str:
    reference, tolerance = one.first, one.tolerance
    if not steady:
        return "not deterministic"
    if all(_same(mean, reference, tolerance) for mean in means.values()):
        return EXACT
    if all(_error(m.value, reference.value) <= tolerance for m in means.values()):
        # A parameter of the loss may have the right gradient all the same.
        divided = True
        for size, mean in means.items():
            whole = {name: size * gradient for name, gradient in mean.gradients.items()}
            own, times = (_errors(g, reference.gradients) for g in (mean.gradients, whole))
            divided &= all(min(own[name], times[name]) <= tolerance for name in own)
        return "gradient divided by W" if divided else "gradient wrong"
    local = all(
        size in one.local and _same(mean, one.local[size], tolerance)
        for size, mean in means.items()
    )
    return "local" if local else "value wrong"


def _line(size: int, mean: Result, reference: Result) -> str:
    """`W = 2: value 3.1 (off by 2e-16), gradient off by 0.5 (0.5 of the length, cosine 1)`."""
    mine, right = (np.concatenate([g.ravel() for g in r.gradients.values()])
                   for r in (mean, reference))  # fmt: skip
    lengths = float(np.linalg.norm(mine)), float(np.linalg.norm(right))
    about = "0 of the length"
    if min(lengths):
        cosine = float(mine @ right) / lengths[0] / lengths[1]
        about = f"{lengths[0] / lengths[1]:.4g} of the length, cosine {cosine:.4f}"
    return (
        f"W = {size}: value {mean.value:.10g} (off by {_error(mean.value, reference.value):.1e}), "
        f"gradient off by {_error(mine, right):.1e} ({about})"
    )


def _mean(results: Sequence[Result]) -> Result:
    """The mean over processes: what DDP makes of the gradients."""
    names = results[0].gradients
    gradients = {n: np.mean([r.gradients[n] for r in results], axis=0) for n in names}
    return Result(math.fsum(r.value for r in results) / len(results), gradients)


def _same(a: Result, b: Result, tolerance: float) -> bool:
    errors = [_error(a.value, b.value), *_errors(a.gradients, b.gradients).values()]
    return all(error <= tolerance for error in errors)


def _errors(ours: Gradients, theirs: Gradients) -> dict[str, float]:
    """Relative errors. A gradient that is zero but for rounding is compared with the largest."""
    largest = max(float(np.linalg.norm(g)) for g in theirs.values())
    return {name: _error(ours[name], g, 1e-3 * largest) for name, g in theirs.items()}


def _error(ours: Any, theirs: Any, at_least: float = 0.0) -> float:
    """|ours - theirs| / |theirs|, which is at least `FLOOR`; infinite if only one is finite."""
    if np.array_equal(ours, theirs, equal_nan=True):
        return 0.0
    size = max(float(np.linalg.norm(theirs)), at_least, FLOOR)
    error = float(np.linalg.norm(np.subtract(ours, theirs))) / size
    return error if math.isfinite(error) else math.inf
