"""Gradients averaged over processes."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ddp_ssl.distributed.primitives import traffic
from ddp_ssl.distributed.world import World


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
    ready = functools.partial(traffic.gradient_ready, itemsize=itemsize)
    for parameter in module.parameters():
        if parameter.requires_grad:
            cast(Any, parameter).register_post_accumulate_grad_hook(ready)
    parallel = DistributedDataParallel(module, ids, gradient_as_bucket_view=True, **options)
    if compression is not None:
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel
