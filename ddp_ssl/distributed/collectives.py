"""The data x view mesh, its collectives with their adjoints, and the mean of gradients."""

import functools
import inspect
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.distributed.primitives import (
    all_gather_single,
    comm_stats,
    reduce_scatter_single,
    run_collective,
)
from ddp_ssl.distributed.world import World


class _Gather(torch.autograd.Function):
    """[n, ...] -> [W, n, ...]; backward is a reduce-scatter of the cotangents."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
        run_collective("gather", all_gather_single, out, x.contiguous())
        return out.view(-1, *x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        out = grad.new_empty(grad.shape[1:])
        run_collective("scatter", reduce_scatter_single, out, grad.contiguous().flatten(0, 1))
        return out


class _Sum(torch.autograd.Function):
    """All-reduce; backward is an all-reduce of the cotangents over the same group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        run_collective("sum" if group is None else "view sum", dist.all_reduce, total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.forward(ctx, grads[0], ctx.group), None


class MeshComm(Comm):
    """The data x view mesh: rank r is data shard r // V and view shard r % V.

    A view group (V neighbours) holds different views of the same images; view shard s holds the
    views k with k mod V = s.
    """

    def __init__(self, world: World, view_shards: int = 1) -> None:
        if world.size % view_shards:
            raise ValueError(f"{view_shards} view shards do not divide {world.size} processes")
        self.world = world
        self.rank, self.world_size, self.view_shards = world.rank, world.size, view_shards
        self._view_group: Any = None
        self._view_side: Any = None  # gloo, for the hosts
        if view_shards > 1:
            first = world.rank // view_shards * view_shards
            common: dict[str, Any] = {
                "ranks": list(range(first, first + view_shards)),
                "timeout": world.timeout,
                "use_local_synchronization": True,  # only the members wait for each other
            }
            self._view_group = dist.new_group(**common)
            self._view_side = dist.new_group(**common, backend="gloo")

    def gather(self, x: Tensor) -> Tensor:
        if self.world_size == 1:
            return x
        k, n, *rest = x.shape
        stacked = cast(Tensor, _Gather.apply(x)).view(
            self.data_shards, self.view_shards, k, n, *rest
        )
        order = stacked.permute(2, 1, 0, 3, *range(4, stacked.dim()))
        return order.reshape(k * self.view_shards, self.data_shards * n, *rest)

    def sum(self, x: Tensor) -> Tensor:
        return x if self.world_size == 1 else cast(Tensor, _Sum.apply(x, None))

    def view_sum(self, x: Tensor) -> Tensor:
        return x if self.view_shards == 1 else cast(Tensor, _Sum.apply(x, self._view_group))

    def view_union(self, found: dict[int, str]) -> dict[int, str]:
        if self.view_shards == 1:
            return found
        # The counts first: nearly always there is nothing to exchange.
        count = torch.tensor([len(found)])
        run_collective("host", dist.all_reduce, count, group=self._view_side)
        if not int(count):
            return found
        gathered: list[Any] = [None] * self.view_shards
        # Not counted, since other view groups skip this and all counts must agree.
        dist.all_gather_object(gathered, found, group=self._view_side)
        union: dict[int, str] = {}
        for part in gathered:
            union = part | union
        return union

    def broadcast(self, value: float) -> float:
        # On the host group: the others may wait here for a long computation on rank 0.
        return float(self.world.broadcast_object(value))


def comm_of(world: World, view_shards: int = 1) -> Comm:
    """The `Comm` of this world: the identity for one process."""
    return MeshComm(world, view_shards) if world.size > 1 else ONE_PROCESS


def data_parallel(
    module: nn.Module, world: World, compression: Literal["bf16"] | None = None
) -> nn.Module:
    """The module under DDP, or the module itself without a process group.

    Buffers are not broadcast, since they are equal on all processes. `compression` is the type in
    which gradients are sent, if it is not their own.
    """
    if not dist.is_initialized():
        return module
    ids = [world.device.index] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    # torch has renamed the option.
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {no_sync: False}
    itemsize = None if compression is None else torch.bfloat16.itemsize
    ready = functools.partial(comm_stats.gradient_ready, itemsize=itemsize)
    for parameter in module.parameters():
        if parameter.requires_grad:
            cast(Any, parameter).register_post_accumulate_grad_hook(ready)
    parallel = DistributedDataParallel(module, ids, gradient_as_bucket_view=True, **options)
    # DDP times itself in its first ten steps and every hundredth, and makes the host wait there.
    cast(Any, parallel)._set_ddp_runtime_logging_sample_rate(2**31 - 1)
    if compression is not None:
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel
