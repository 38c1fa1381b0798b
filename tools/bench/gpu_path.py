"""Bytes, operators and collectives of a network's step on a GPU, counted without one.

    python tools/bench/gpu_path.py [--networks resnet50 resnet18] [--images 128] [--processes 8]

Tensors have no values (torch's `meta` device), so nothing is computed. Counted are forward and
backward of two views in bf16, channels-last, as one process of `--processes`. `global` and `local`
are this package's norm. `sync` is `nn.SyncBatchNorm`, whose statistics are those of both views
together. Bytes are what operators read and write; the least time is theirs at `--copy` GB/s.
`tools/gpu_report.sh` measures on a GPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import timm
import torch
from compare import parser_of
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddp_ssl import distributed
from ddp_ssl.distributed import ViewLayout, comm_stats

NORMS = ("global", "sync", "local")
SIZE = 224


class Moved(TorchDispatchMode):
    """Bytes that operators read and write, and the number of operators.

    Views move nothing. An expanded dimension is read once. Overwritten tensors are not read.
    """

    FREE = ("empty", "detach", "alias", "lift_fresh", "_unsafe_view", "record_stream", "set_")

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.operators = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func.overloadpacket)
        if not (func.is_view or "c10d" in name or any(n in name for n in self.FREE)):
            self.operators += 1
            nbytes = moved(name, args, kwargs, out)
            self.nbytes += nbytes
            self.saw(func, args, kwargs, out, nbytes)
        return out

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any, nbytes: int) -> None:
        """A further count, for subclasses."""


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
    return x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


SHAPES = {
    "batch_norm_stats": lambda x, eps: (_channels(x), _channels(x)),
    "batch_norm_elemt": lambda x, *rest: torch.empty_like(x),
    "batch_norm_elemt.out": lambda x, *rest, out: out,
    "batch_norm_gather_stats_with_counts": lambda x, mean, *rest: (
        mean.new_empty(mean.shape[1]), mean.new_empty(mean.shape[1]),
    ),
    "batch_norm_backward_reduce": lambda grad, x, *rest: tuple(_channels(x) for _ in range(4)),
    "batch_norm_backward_elemt": lambda grad, x, *rest: torch.empty_like(x),
}  # fmt: skip


@contextlib.contextmanager
def as_on_a_gpu(processes: int) -> Iterator[None]:
    """Within: tensors without values take the way of a GPU's, as rank 0 of so many processes."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    for name, shape in SHAPES.items():
        library.impl(name, shape)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        with (
            patch.object(distributed.batch_norm, "_has_kernels", lambda x: True),
            # `nn.SyncBatchNorm` picks the processes with images, for which a GPU's host waits.
            patch.object(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True),
        ):
            yield
    finally:
        torch.distributed.destroy_process_group()
        library._destroy()


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
    with as_on_a_gpu(processes), Moved() as seen:
        x = torch.empty(2 * images, SIZE, SIZE, 3, device="meta", dtype=torch.bfloat16)
        before = comm_stats.calls
        with distributed.stacked_views(layout, 2, slice(None)):
            out = made(x.permute(0, 3, 1, 2))
        out.float().square().sum().backward()
        return seen, comm_stats.calls - before


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "resnet18"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--copy", type=float, default=4260.0, help="GB/s; an H200's, measured")
    options = parser.parse_args()
    print(f"two views of {options.images} images, {options.processes} processes\n")
    print("| network | norm | GB | operators | collectives | least ms to move it |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in options.networks:
        for norm in NORMS:
            seen, calls = count(name, norm, options.images, options.processes)
            calls = "2 a layer" if norm == "sync" else calls
            least = seen.nbytes / options.copy / 1e6
            print(
                f"| {name} | {norm} | {seen.nbytes / 1e9:.1f} | {seen.operators} | {calls} "
                f"| {least:.1f} |"
            )


if __name__ == "__main__":
    main()
