"""The cost of a step on a GPU, counted on tensors without values."""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ddp_ssl import distributed, optim
from ddp_ssl.config import Config
from ddp_ssl.config.views import views_of
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import World, comm_stats
from ddp_ssl.losses.kernels import gram, unit_rows
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import make_method
from ddp_ssl.methods.base import Method, Progress
from ddp_ssl.methods.deepclusterv2 import DeepClusterV2, Memory
from ddp_ssl.run.configure import load
from ddp_ssl.training.build import parameter_groups
from ddp_ssl.training.loop import gradient_norm
from ddp_ssl.training.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
SIZE = 224
UNIT = 512  # bytes: CUDA's allocator hands out multiples


class Moved(TorchDispatchMode):
    """Bytes that operators read and write, operators, collectives, the memory of tensors.

    Views move nothing. An expanded dimension is read once. Overwritten tensors are not read.
    A tensor from before takes memory from the start if an operator uses it. What an operator
    allocates for itself is not seen.
    """

    FREE = (
        "empty", "detach", "alias", "lift_fresh", "_unsafe_view", "record_stream", "set_",
        "prim.", "profiler.", "promote_types",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.operators = 0, 0
        self.calls = 0
        """Collectives, without those of DDP."""
        self.stage = "step"
        self.peaks: Counter[str] = Counter()
        """The most memory in each stage, without what was there before."""
        self.before = 0
        self._now = 0
        self._storages: dict[int, tuple[Any, int]] = {}

    @property
    def peak(self) -> int:
        """The most bytes that all tensors held at once."""
        return self.before + max(self.peaks.values())

    def _holds(self, tensors: Any, before: bool) -> None:
        for storage in (x.untyped_storage() for x in tree_leaves(tensors) if isinstance(x, Tensor)):
            key, nbytes = id(storage), -(-storage.nbytes() // UNIT) * UNIT
            if key not in self._storages:
                freed = weakref.ref(storage, lambda _, key=key: self._frees(key))
                self._storages[key] = freed, nbytes
                self.before += nbytes * before
                self._now += nbytes * (not before)

    def _frees(self, key: int) -> None:
        self._now -= self._storages.pop(key)[1]

    def is_from_before(self, x: Tensor) -> None:
        """Count `x` as memory from before, such as a gradient, which DDP's buckets hold."""
        key = id(x.untyped_storage())
        freed, nbytes = self._storages[key]
        self._storages[key] = freed, 0
        self._now -= nbytes
        self.before += nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._holds((args, kwargs), before=True)
        # Rows are picked from those of all processes that have images, and all have some.
        out = args[0].clone() if by_mask(func, args) else func(*args, **kwargs)
        self._holds(out, before=False)
        self.peaks[self.stage] = max(self.peaks[self.stage], self._now)
        name = str(func.overloadpacket)
        if name.startswith("c10d."):
            self.calls += 1
        elif not (func.is_view or any(n in name for n in self.FREE)):
            self.operators += 1
            nbytes = moved(name, args, kwargs, out)
            self.nbytes += nbytes
            self.saw(func, args, kwargs, out, nbytes)
        return out

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any, nbytes: int) -> None:
        """A hook for subclasses that count more."""


def by_mask(func: Any, args: Any) -> bool:
    """Whether the operator picks rows by values that are not there."""
    return (
        func is torch.ops.aten.index.Tensor
        and (args[0].is_meta or isinstance(args[0], FakeTensor))
        and any(x is not None and x.dtype == torch.bool for x in args[1])
    )


def waits(args: Any, kwargs: Any, out: Any) -> bool:
    """Whether the operator copies between a GPU and the host, and the host waits for it."""
    read = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    made = {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)}
    # `copy_` has `non_blocking` as its third argument.
    without = kwargs.get("non_blocking") or (len(args) == 3 and args[2] is True)
    return "cuda" in read | made and "cpu" in read | made and not without


READ_TWICE = {
    "native_batch_norm": 1, "native_batch_norm_backward": 2,
    "cudnn_batch_norm": 1, "cudnn_batch_norm_backward": 2,
}  # fmt: skip
"""How many of its first arguments an operator reads for its sums, and again for its result."""
WRITTEN = {"_fused_adam_": (0, 2, 3), "_fused_adamw_": (0, 2, 3)}
"""Arguments that an operator without a result writes, if not the first one."""
FIRST_UNREAD = ("copy_", "_foreach_copy_", "batch_norm_gather_stats_with_counts")
"""Operators that do not read their first argument: they overwrite it or need its type alone."""


def moved(name: str, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operator reads and writes."""
    read = args[1:] if name.removeprefix("aten.") in FIRST_UNREAD else args
    named = {key: value for key, value in kwargs.items() if not key.startswith("out")}
    if out is None:  # operators on lists write into their arguments
        out = [args[index] for index in WRITTEN.get(name.removeprefix("aten."), (0,))]
    again = args[: READ_TWICE.get(name.removeprefix("aten."), 0)]
    every = tree_leaves((read, again, named, out))
    return sum(stored(x) for x in every if isinstance(x, Tensor))


def stored(x: Tensor) -> int:
    """Bytes of a tensor in memory."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def _channels(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


SHAPES = {
    "batch_norm_stats": lambda x, eps: (_channels(x), _channels(x)),
    "batch_norm_elemt": lambda x, *rest: torch.zeros_like(x),
    "batch_norm_elemt.out": lambda x, *rest, out: out.zero_(),
    "batch_norm_gather_stats_with_counts": lambda x, mean, *rest: (
        mean.new_zeros(mean.shape[1]), mean.new_zeros(mean.shape[1]),
    ),
    "batch_norm_backward_reduce": lambda grad, x, *rest: tuple(_channels(x) for _ in range(4)),
    "batch_norm_backward_elemt": lambda grad, x, *rest: torch.zeros_like(x),
}  # fmt: skip


@contextlib.contextmanager
def as_one_of(processes: int) -> Iterator[None]:
    """In this context the process is rank 0 of `processes`, and collectives do nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def as_on_a_gpu(key: str = "Meta") -> Iterator[None]:
    """In this context tensors without values (with `CPU`, the CPU's) take a GPU's code path."""
    library = torch.library.Library("aten", "IMPL", key)
    for name, shape in SHAPES.items():
        library.impl(name, shape)
    optim._blocks.cache_clear()
    try:
        with (
            patch.object(distributed.batch_norm, "_has_kernels", lambda x: True),
            patch.object(unit_rows, "_has_tensor_cores", lambda x: True),
            patch.object(optim, "_alike", optim._expanded),
            patch.object(optim, "_on_gpu", lambda parameters: True),
            patch.dict(optim.AT_ONCE, cpu=optim.AT_ONCE["cuda"]),
            patch.multiple(
                gram,
                BLOCK=gram.BLOCK * gram.ON_GPU,
                KEPT=gram.KEPT_ON_GPU,
                CACHED=gram.AT_ONCE,
                MIRRORED=sys.maxsize,
            ),
        ):
            yield
    finally:
        optim._blocks.cache_clear()  # they have no values
        library._destroy()


# --- a whole step --------------------------------------------------------------------------------


def method_config(name: str, *more: str) -> Config:
    """The method's recipe with two views of 224 px in bf16, and more `key=value`."""
    return load([
        str(ROOT / f"configs/imagenet100/{name}.yaml"), "data.name=imagenet", "data.root=.",
        f"data.views=[{{count: 2, size: {SIZE}, recipe: sym}}]", "optim.precision=bf16", *more,
    ]).config  # fmt: skip


PARTS = ("forward", "backward", "update", "record")
STAGES = ("backbone", *PARTS[:3])  # of memory; `forward` is what follows the trained backbone


class Counted(Moved):
    """The same by part of the step (`PARTS`), with the operators for which a host would wait."""

    WAITING = (
        "_linalg_svd", "_linalg_eigh", "linalg_qr", "_linalg_check_errors", "_local_scalar_dense",
        "nonzero", "masked_select", "bincount", "_unique2", "equal", "is_nonzero",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.part = self.stage = PARTS[0]
        self.parts: Counter[str] = Counter()
        self.names: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
        self.waits = 0
        self.kept_on: set[str] = set()
        """Devices of the loss and the metrics."""
        self.collectives: dict[str, tuple[int, int]] = {}
        """Calls and bytes of each kind of collective, as this package counts them."""

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any, nbytes: int) -> None:
        name = str(func.overloadpacket).removeprefix("aten.")
        self.parts[self.part] += 1
        self.names[self.part][name] += 1
        self.waits += name in self.WAITING or by_mask(func, args) or waits(args, kwargs, out)

    @property
    def sent(self) -> int:
        """Bytes of the tensors that collectives reduce or gather, gradients included."""
        return sum(nbytes for _, nbytes in self.collectives.values())


def without_values(module: nn.Module, mode: FakeTensorMode, device: str | None = None) -> None:
    """Replace all parameters and buffers by their shapes, on another device if one is given."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                if id(value) not in made:
                    shape = mode.from_tensor(value.detach())
                    if device is not None:
                        with mode:
                            shape = torch.empty_like(shape, device=device)
                    trained = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(shape, value.requires_grad) if trained else shape
                tensors[name] = made[id(value)]


def under_way(method: Method[Any], images: int) -> None:
    """The state of a run that has measured alpha and filled its queues and its memory."""
    if hasattr(method, "alpha"):
        method.alpha.value = 0.5
    if hasattr(method, "queued"):
        method.queued, method.epoch = sys.maxsize, EPOCH
    if isinstance(method, DeepClusterV2):
        one = method.centroids(0).new_empty(1, 1, 1)
        shape = method.remembered, images, method.centroids(0).shape[1]
        method.memory = Memory(one.expand(shape), method.comm)
        heads = len(method.settings.prototypes)
        method.assignments = one.new_zeros(heads, images, dtype=torch.long)


EPOCH, EPOCHS = 60, 100


def whole_step(
    config: Config,
    processes: int,
    classes: int = 1000,
    *,
    values: bool = False,
    device: str = "cpu",
    norm: Literal["own", "sync"] = "own",
    loop: "type[Step] | None" = None,
    seen: Counted | None = None,
) -> Counted:
    """A step of the loop, once the optimiser has its state, as rank 0 of so many processes.

    With `values` a small network really runs on the CPU, which is faster than without. `device`:
    that of tensors without values. `norm`: this package's, or `nn.SyncBatchNorm`. `loop`: the
    trainer's, or a plain one. `seen` counts.
    """
    seen = seen or Counted()
    world = World(0, processes, 0, min(processes, 8), torch.device(device))
    with as_one_of(processes), as_on_a_gpu("CPU" if values else "Meta"):
        comm = distributed.comm_of(world, config.data.view_shards)
        learner = Learner(make_method(config, comm), classes, some_unlabelled=False).train()
        if config.model.channels_last:
            learner.to(memory_format=torch.channels_last)
        if norm == "sync":
            synchronise(learner, processes)
        shapes = contextlib.nullcontext() if values else FakeTensorMode(allow_non_fake_inputs=True)
        with shapes as mode:
            if mode is not None:
                without_values(learner, mode, device)
            under_way(learner.method, 10 * config.data.batch_size)
            (loop or Step)(config, world, learner).run(seen)
    return seen


class Step:
    """The loop's step (`training/loop.py`) on tensors without values."""

    def __init__(self, config: Config, world: World, learner: Learner) -> None:
        self.config, self.world, self.learner = config, world, learner
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = self.made_optimizer()
        self.recorder = Recorder(config, world, 100, None, None, None)  # type: ignore[arg-type]
        comm = learner.method.comm
        n = config.data.batch_size // comm.data_shards
        kind = torch.float16 if config.data.dtype == "float16" else torch.float32
        views = [
            torch.zeros(n, view.size, view.size, 3, dtype=kind, device=world.device)
            for view in views_of(config.data.views)[comm.views]
        ]
        labels = torch.zeros(n, dtype=torch.long, device=world.device)
        self.batch = Batch([view.permute(0, 3, 1, 2) for view in views], torch.arange(n), labels)

        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # makes its state
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        return self.learner

    def made_optimizer(self) -> torch.optim.Optimizer:
        return optim.build(self.config.optim, parameter_groups(self.learner, self.config))

    def run(self, seen: Counted) -> None:
        """Take a step, which `seen` counts."""
        backbone = self.learner.method.backbone
        backbone.register_forward_pre_hook(lambda *_: setattr(seen, "stage", "backbone"))
        backbone.register_forward_hook(lambda *_: setattr(seen, "stage", "forward"))
        for p in self.trained:
            p.register_post_accumulate_grad_hook(lambda p: seen.is_from_before(p.grad))
        before = dict(comm_stats.counts)
        with seen:
            self.take(seen)
        for kind, (calls, nbytes) in comm_stats.counts.items():
            old = before.get(kind, (0, 0))
            if calls > old[0]:
                seen.collectives[kind] = calls - old[0], nbytes - old[1]
        seen.collectives["gradients"] = 0, sum(p.nbytes for p in self.trained)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def take(self, seen: Counted) -> None:
        """A step; `seen` is told of its parts."""
        method, progress = self.learner.method, Progress(EPOCH * 10, EPOCHS * 10, EPOCH, EPOCHS)
        optim.set_learning_rates(self.optimizer, self.config.optim, 256, EPOCH * 10, 10)
        loss, metrics = self.learner(self.batch)
        seen.part = seen.stage = "backward"
        self.backward(loss)
        seen.part = seen.stage = "update"
        method.before_optimizer(progress)
        norm = gradient_norm(
            [p for p in method.parameters() if p.requires_grad], self.config.optim.grad_clip
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        method.after_step(progress)
        seen.part = seen.stage = "record"
        self.recorder.add(1, metrics | {"optim/lr": 0.1, "optim/grad_norm": norm})
        kept = loss, norm, *metrics.values()
        seen.kept_on = {x.device.type for x in kept if isinstance(x, Tensor)}


# --- the norm of torch ---------------------------------------------------------------------------


class _Synchronised(_BatchNorm):
    """`nn.SyncBatchNorm`, which takes tensors of a GPU only, on tensors without values."""

    processes = 1

    def forward(self, input: Tensor) -> Tensor:
        function = torch.nn.modules._functions.SyncBatchNorm
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        out = function.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps,
            self.momentum, torch.distributed.group.WORLD, self.processes,
        )  # fmt: skip
        for name in ("drop", "act", "after"):  # timm's activation, here and in `GlobalBatchNorm`
            out = getattr(self, name, nn.Identity())(out)
        return out


def synchronise(network: nn.Module, processes: int) -> None:
    """Make every batch norm `nn.SyncBatchNorm`."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__, module.processes = _Synchronised, processes
