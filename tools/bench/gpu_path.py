"""Bytes, operators, peak memory and collectives of a step on a GPU, counted without one.

    python tools/bench/gpu_path.py                     all, below
    python tools/bench/gpu_path.py methods [--network resnet50] [--images 128] [--processes 8 512]
    python tools/bench/gpu_path.py norms [--networks resnet50 resnet18] [--processes 8]
    python tools/bench/gpu_path.py layers [--networks resnet50 vit_small_patch16_224]

Tensors have no values, so nothing is computed. `methods` counts a whole step of every method as the
loop takes it: network, loss, backward, gradient norm, optimiser, hooks, probe and the recorder's
row, two views of 224 px in bf16. DDP's own work is not counted, but its buckets are in the memory.
A second table has the most memory in each part of the step, with all that was there before it:
parameters, state, gradients, views. `norms` counts forward and backward of the backbone alone:
`global` and `local` are this package's norm, `sync` is `nn.SyncBatchNorm`, whose statistics are
those of both views together. Bytes are what operators read and write; the least time is theirs at
`--copy` GB/s. `layers` counts the whole step of AdaDim by kind of layer, with the products too: an
operator takes at least the longer of its two times.
`tools/gpu_report.sh` measures on a GPU.
"""

import argparse
import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ddp_ssl import distributed, optim
from ddp_ssl.config import Config
from ddp_ssl.config.views import views_of
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import ViewLayout, World, comm_stats
from ddp_ssl.losses.kernels import gram, unit_rows
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import builtin_methods, make_method
from ddp_ssl.methods.base import Method, Progress
from ddp_ssl.methods.deepclusterv2 import DeepClusterV2, Memory
from ddp_ssl.run.configure import load
from ddp_ssl.training.build import parameter_groups
from ddp_ssl.training.loop import gradient_norm
from ddp_ssl.training.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
NORMS = ("global", "sync", "local")
SIZE = 224
UNIT = 512  # bytes: CUDA's allocator hands out multiples


class Moved(TorchDispatchMode):
    """Bytes that operators read and write, the number of operators, and the memory of tensors.

    Views move nothing. An expanded dimension is read once. Overwritten tensors are not read.
    A tensor from before takes memory from the start if an operator uses it. What an operator
    allocates for itself is not seen.
    """

    FREE = (
        "empty", "detach", "alias", "lift_fresh", "_unsafe_view", "record_stream", "set_",
        "prim.", "profiler.", "promote_types", "c10d",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.operators = 0, 0
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
        out = func(*args, **kwargs)
        self._holds(out, before=False)
        self.peaks[self.stage] = max(self.peaks[self.stage], self._now)
        name = str(func.overloadpacket)
        if not (func.is_view or any(n in name for n in self.FREE)):
            self.operators += 1
            nbytes = moved(name, args, kwargs, out)
            self.nbytes += nbytes
            self.saw(func, args, kwargs, out, nbytes)
        return out

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any, nbytes: int) -> None:
        """A hook for subclasses that count more."""


def moved(name: str, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operator reads and writes."""
    read = args[1:] if name == "aten.copy_" else args
    named = {key: value for key, value in kwargs.items() if not key.startswith("out")}
    return sum(stored(x) for x in tree_leaves((read, named, out)) if isinstance(x, Tensor))


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
            # `nn.SyncBatchNorm` picks the processes with images, for which a GPU's host waits.
            patch.object(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True),
        ):
            yield
    finally:
        optim._blocks.cache_clear()  # they have no values
        library._destroy()


# --- a whole step --------------------------------------------------------------------------------


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
        self.collectives: dict[str, tuple[int, int]] = {}

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any, nbytes: int) -> None:
        name = str(func.overloadpacket).removeprefix("aten.")
        self.parts[self.part] += 1
        self.names[self.part][name] += 1
        self.waits += name in self.WAITING

    @property
    def calls(self) -> int:
        """Collectives, without DDP's."""
        return sum(calls for calls, _ in self.collectives.values())

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
    values: bool = False,
    seen: Counted | None = None,
) -> Counted:
    """A step of the loop, once the optimiser has its state, as rank 0 of so many processes.

    With `values` a small network really runs on the CPU, which is faster than without. `seen`
    counts.
    """
    seen = seen or Counted()
    world = World(0, processes, 0, min(processes, 8), torch.device("cpu"))
    with as_one_of(processes), as_on_a_gpu("CPU" if values else "Meta"):
        comm = distributed.comm_of(world, config.data.view_shards)
        learner = Learner(make_method(config, comm), classes, some_unlabelled=False).train()
        if config.model.channels_last:
            learner.to(memory_format=torch.channels_last)
        shapes = contextlib.nullcontext() if values else FakeTensorMode(allow_non_fake_inputs=True)
        with shapes as mode:
            if mode is not None:
                without_values(learner, mode)
            under_way(learner.method, 10 * config.data.batch_size)
            _Step(config, world, learner).run(seen)
    return seen


class _Step:
    """The loop's step (`training/loop.py`) on tensors without values."""

    def __init__(self, config: Config, world: World, learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.optimizer = optim.build(config.optim, parameter_groups(learner, config))
        self.recorder = Recorder(config, world, 100, None, None, None)  # type: ignore[arg-type]
        self.trained = [p for p in learner.parameters() if p.requires_grad]
        comm = learner.method.comm
        n = config.data.batch_size // comm.data_shards
        kind = torch.float16 if config.data.dtype == "float16" else torch.float32
        views = [
            torch.zeros(n, view.size, view.size, 3, dtype=kind).permute(0, 3, 1, 2)
            for view in views_of(config.data.views)[comm.views]
        ]
        self.batch = Batch(views, torch.arange(n), torch.zeros(n, dtype=torch.long))

        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # makes its state
        self.optimizer.zero_grad(set_to_none=True)

    def run(self, seen: Counted) -> None:
        """Take a step, which `seen` counts."""
        method = self.learner.method
        method.backbone.register_forward_pre_hook(lambda *_: setattr(seen, "stage", "backbone"))
        method.backbone.register_forward_hook(lambda *_: setattr(seen, "stage", "forward"))
        for p in self.trained:
            p.register_post_accumulate_grad_hook(lambda p: seen.is_from_before(p.grad))
        before = dict(comm_stats.counts)
        optim.set_learning_rates(self.optimizer, self.config.optim, 256, EPOCH * 10, 10)
        progress = Progress(EPOCH * 10, EPOCHS * 10, EPOCH, EPOCHS)
        with seen:
            loss, metrics = self.learner(self.batch)
            seen.part = seen.stage = "backward"
            loss.backward()
            seen.part = seen.stage = "update"
            method.before_optimizer(progress)
            norm = gradient_norm(
                [p for p in method.parameters() if p.requires_grad], self.config.optim.grad_clip
            )
            self.optimizer.step()
            sent = sum(p.grad.nbytes for p in self.trained if p.grad is not None)
            self.optimizer.zero_grad(set_to_none=True)
            method.after_step(progress)
            seen.part = seen.stage = "record"
            self.recorder.add(1, metrics | {"optim/lr": 0.1, "optim/grad_norm": norm})
        for kind, (calls, nbytes) in comm_stats.counts.items():
            old = before.get(kind, (0, 0))
            if calls > old[0]:
                seen.collectives[kind] = calls - old[0], nbytes - old[1]
        seen.collectives["gradients"] = 0, sent


# --- kinds of layers -----------------------------------------------------------------------------


KINDS = {
    "batch norm": ("batch_norm",),
    "layer norm": ("layer_norm",),
    "activation": ("relu", "threshold", "gelu"),
    "attention": ("scaled_dot_product",),
    "pooling": ("max_pool", "avg_pool", "mean"),
    "linear layer, product": ("mm", "sum"),
    "sum of two paths": ("add",),
    "cast, copy, concatenation": ("copy", "cat", "clone", "stack"),
}  # words in an operator's name; the first that fits


OTHER = "losses, probe, all else"


class ByLayer(Counted):
    """Operators, bytes and products of each kind of layer; losses and optimiser apart."""

    def __init__(self, copy: float, products: float) -> None:
        super().__init__()
        self.copy, self.products = copy, products
        self.kinds: dict[str, list[float]] = {}

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any, nbytes: int) -> None:
        super().saw(func, args, kwargs, out, nbytes)
        packet, flops = func.overloadpacket, 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        times = nbytes / self.copy / 1e6, flops / self.products / 1e9  # ms
        row = self.kinds.setdefault(self.kind(str(packet), args, kwargs, out), [0.0] * 4)
        for i, value in enumerate((1, nbytes / 1e9, flops / 1e12, max(times))):
            row[i] += value

    def kind(self, name: str, args: Any, kwargs: Any, out: Any) -> str:
        """The kind of layer, from the operator's name and the size of a convolution's kernel."""
        name = name.removeprefix("aten.")
        if self.part not in PARTS[:2]:
            return "optimiser, momentum, row"
        if name.startswith("convolution"):
            size = args[2 if name.endswith("backward") else 1].shape[-1]
            return f"convolution, {size} x {size}"
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # Losses see two views `[2, n, d]` in float32.
        if not any(x.dtype == torch.bfloat16 or (x.dim() > 2 and len(x) > 2) for x in tensors):
            return OTHER
        return next((k for k, words in KINDS.items() if any(w in name for w in words)), OTHER)


def layers(options: argparse.Namespace) -> None:
    """A table for each network: a step of AdaDim by kind of layer, the longest first."""
    for name in options.networks:
        settings = f"model.backbone={name}", f"data.batch_size={8 * options.images}"
        seen = ByLayer(options.copy, options.products)
        whole_step(method_config("adadim", *settings), 8, seen=seen)
        rows = sorted(seen.kinds.items(), key=lambda row: -row[1][-1])
        rows.append(("all", [sum(column) for column in zip(*seen.kinds.values(), strict=True)]))
        print(f"{name}, two views of {options.images} images, bf16, one of 8 processes\n")
        print("| layer | operators | GB | TFLOP | ms at least | bound by |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        for kind, (operators, gbytes, tflop, least) in rows:
            by = "bytes" if gbytes / options.copy > tflop / options.products else "products"
            print(f"| {kind} | {operators:.0f} | {gbytes:.1f} | {tflop:.2f} | {least:.1f} | {by} |")
        print(flush=True)


# --- the norm ------------------------------------------------------------------------------------


class _Synchronised(nn.BatchNorm2d):
    """`nn.SyncBatchNorm`, which takes tensors of a GPU only, on tensors without values."""

    processes = 1

    def forward(self, input: Tensor) -> Tensor:
        function = torch.nn.modules._functions.SyncBatchNorm
        return function.apply(  # type: ignore[no-any-return]
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps,
            self.momentum, torch.distributed.group.WORLD, self.processes,
        )  # fmt: skip


def network(name: str, norm: str, layout: ViewLayout, processes: int) -> nn.Module:
    """A timm network in bf16 with float32 norms, without values."""
    made = timm.create_model(name, num_classes=0)
    if norm != "sync":
        made = distributed.global_batch_norm(made, layout, norm == "global")
    made = made.to("meta", torch.bfloat16, memory_format=torch.channels_last)
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
            if norm == "sync":
                module.__class__, module.processes = _Synchronised, processes
    return made.train()


def count(name: str, norm: str, images: int, processes: int) -> tuple[Moved, int]:
    """Bytes and operators of forward and backward, and the number of collectives."""
    layout = ViewLayout()
    made = network(name, norm, layout, processes)
    with as_one_of(processes), as_on_a_gpu(), Moved() as seen:
        x = torch.empty(2 * images, SIZE, SIZE, 3, device="meta", dtype=torch.bfloat16)
        before = comm_stats.calls
        with distributed.stacked_views(layout, 2, slice(None)):
            out = made(x.permute(0, 3, 1, 2))
        out.float().square().sum().backward()
        return seen, comm_stats.calls - before


def method_config(name: str, *more: str) -> Config:
    """The method's recipe with two views of 224 px in bf16, and more `key=value`."""
    return load([
        str(ROOT / f"configs/imagenet100/{name}.yaml"), "data.name=imagenet", "data.root=.",
        f"data.views=[{{count: 2, size: {SIZE}, recipe: sym}}]", "optim.precision=bf16", *more,
    ]).config  # fmt: skip


def methods(options: argparse.Namespace) -> None:
    """A line for each method."""
    print(f"{options.network}, two views of {options.images} images, bf16\n")
    columns = [f"calls, MB sent, peak GiB, {n} processes" for n in options.processes]
    print(f"| method | GB | operators | {' | '.join(PARTS)} | waits | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * (len(PARTS) + 3 + len(columns))}")
    memory = []
    for name in options.methods or builtin_methods():
        made = []
        for processes in options.processes:
            images = options.images * processes
            settings = [f"model.backbone={options.network}"]
            queue = getattr(method_config(name, *settings).method, "queue_size", 0)
            if 0 < queue < images:
                settings.append(f"method.queue_size={images}")
            settings.append(f"data.batch_size={images}")
            made.append(whole_step(method_config(name, *settings), processes))
        seen = made[0]
        parts = " | ".join(str(seen.parts[part]) for part in PARTS)
        sent = " | ".join(
            f"{one.calls}, {one.sent / 1e6:.0f}, {one.peak / 2**30:.2f}" for one in made
        )
        memory += [(name, *pair) for pair in zip(options.processes, made, strict=True)]
        print(
            f"| {name} | {seen.nbytes / 1e9:.1f} | {seen.operators} | {parts} | {seen.waits} "
            f"| {sent} |", flush=True,
        )  # fmt: skip
    print("\nGiB at most\n")
    print(f"| method | processes | before | {' | '.join(STAGES)} |")
    print(f"| --- |{' ---: |' * (len(STAGES) + 2)}")
    for name, processes, seen in memory:
        row = seen.before, *(seen.before + seen.peaks[stage] for stage in STAGES)
        print(f"| {name} | {processes} | {' | '.join(f'{x / 2**30:.2f}' for x in row)} |")


def norms(options: argparse.Namespace) -> None:
    """A line for each network and norm."""
    (processes,) = options.processes
    print(f"two views of {options.images} images, {processes} processes\n")
    print("| network | norm | GB | operators | collectives | least ms to move it | peak GiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in options.networks:
        for norm in NORMS:
            seen, calls = count(name, norm, options.images, processes)
            calls = "2 a layer" if norm == "sync" else calls
            least = seen.nbytes / options.copy / 1e6
            print(
                f"| {name} | {norm} | {seen.nbytes / 1e9:.1f} | {seen.operators} | {calls} "
                f"| {least:.1f} | {seen.peak / 2**30:.2f} |"
            )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="methods | norms | layers")
    of_methods, of_norms = kinds.add_parser("methods"), kinds.add_parser("norms")
    of_layers = kinds.add_parser("layers")
    of_layers.set_defaults(run=layers)
    of_methods.set_defaults(run=methods)
    of_methods.add_argument("--network", default="resnet50")
    of_methods.add_argument("--methods", nargs="+", default=[])
    of_methods.add_argument("--processes", type=int, nargs="+", default=[8, 512])
    of_norms.set_defaults(run=norms)
    of_norms.add_argument("--networks", nargs="+", default=["resnet50", "resnet18"])
    of_norms.add_argument("--processes", type=int, nargs=1, default=[8])
    networks = ["resnet50", "vit_small_patch16_224"]
    of_layers.add_argument("--networks", nargs="+", default=networks)
    of_layers.add_argument("--products", type=float, default=690.0, help="bf16 TFLOP/s; likewise")
    for kind in (of_norms, of_layers):
        kind.add_argument("--copy", type=float, default=4290.0, help="GB/s; an H200's, measured")
    for kind in (of_methods, of_norms, of_layers):
        kind.add_argument("--images", type=int, default=128)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1:])
    else:
        for kind in ("norms", "layers", "methods"):
            main([kind])
