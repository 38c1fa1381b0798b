"""Losses for `ddp-ssl verify`: right ones, and ones with the faults that people write."""

from __future__ import annotations

import functools
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl.losses import info_nce

contrastive = functools.partial(info_nce, temperature=0.2)


class Gather(torch.autograd.Function):
    """`[n, ...]` of all processes as `[W n, ...]`; gradients are summed over processes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def everyone(z: Tensor) -> Tensor:
    """Rows of all processes, differentiated rightly."""
    rows: Tensor = Gather.apply(z)
    return rows


def sum_of_all(x: Tensor) -> Tensor:
    """An all-reduce, differentiated rightly."""
    return everyone(x[None]).sum(0)


def everyone_constant(z: Tensor) -> Tensor:
    """Rows of all processes without gradient, but for the own slice, which is put back."""
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach())
    parts[dist.get_rank()] = z
    return torch.cat(parts)


def contrast(own: Tensor, a: Tensor, b: Tensor, first: int) -> Tensor:
    """Cross-entropy of `own` rows, which are those of `a` from `first` on, against all of `b`."""
    logits = F.normalize(own, dim=1) @ F.normalize(b, dim=1).T / 0.2
    return F.cross_entropy(logits, torch.arange(len(own)) + first)


def right(a: Tensor, b: Tensor) -> Tensor:
    """Own rows against all columns, which are differentiated."""
    return contrast(a, everyone(a), everyone(b), dist.get_rank() * len(a))


class RightModule(nn.Module):
    """Its state changes with every call, and its parameter takes part."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.count += 1
        moments = sum_of_all((z * self.scale).square().mean((0, 1))) / dist.get_world_size()
        return moments.square().sum() * self.count


class DividedModule(RightModule):
    """The full loss everywhere: the gradient of the parameter is right, that of z divided."""

    def forward(self, z: Tensor) -> Tensor:
        rows = everyone_constant(z.transpose(0, 1)).transpose(0, 1)
        return (rows * self.scale).square().mean((0, 1)).square().sum()


def single(z: Tensor) -> Tensor:
    """In float32, whose rounding is no fault."""
    return right(*z.float())


def whole_only(z: Tensor) -> Tensor:
    """Takes no part of the batch alone."""
    rows = everyone(z.transpose(0, 1))
    if len(rows) < 12:
        raise ValueError("too few")
    return rows.square().mean().square()


def local(a: Tensor, b: Tensor) -> Tensor:
    return contrast(a, a, b, 0)


def divided(a: Tensor, b: Tensor) -> Tensor:
    whole = everyone_constant(a)
    return contrast(whole, whole, everyone_constant(b), 0)


def divided_in_place(z: Tensor) -> Tensor:
    """An all-reduce that autograd does not see."""
    moments = z.square().mean((0, 1))
    dist.all_reduce(moments)
    return (moments / dist.get_world_size()).square().sum()


def one_sided(a: Tensor, b: Tensor) -> Tensor:
    """Own rows against columns of which only the own ones are differentiated."""
    return contrast(a, everyone_constant(a), everyone_constant(b), dist.get_rank() * len(a))


def own_statistics(a: Tensor, b: Tensor) -> Tensor:
    """Gathers, but normalises by the statistics of its own part."""
    a, b = (everyone((x - x.mean(0)) / x.std(0)) for x in (a, b))
    return (a.T @ b / len(a)).square().sum()


def summed(z: Tensor) -> Tensor:
    """A sum over processes that is not divided by their number."""
    return sum_of_all(z.square().mean())


def noisy(z: Tensor) -> Tensor:
    return (z + 1e-3 * torch.randn_like(z)).square().mean()


def one_more(z: Tensor) -> Tensor:
    """Process 0 calls a collective that the others do not call."""
    loss = z.square().mean()
    if dist.get_rank() == 0:
        dist.all_reduce(loss.detach())
    return loss


def uneven(z: Tensor) -> Tensor:
    """Gathers those rows that are large: another number on every process."""
    large = z[0][z[0].norm(dim=1) > 3]
    return everyone(large).square().sum() + z.square().mean()


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        (grad,) = grads
        dist.all_reduce(grad, dist.ReduceOp.SUM if dist.get_rank() else dist.ReduceOp.MAX)
        if dist.get_rank():
            dist.all_reduce(grad[:1])
        return grad


def one_more_backward(z: Tensor) -> Tensor:
    out: Tensor = Backward.apply(z.square().mean((0, 2)))
    return out.mean()


def raises_on_one(z: Tensor) -> Tensor:
    if dist.get_rank():
        raise RuntimeError("no such row")
    return everyone(z).square().mean()


def dies(z: Tensor) -> Tensor:
    os._exit(3)


def leaves(z: Tensor) -> Tensor:
    sys.exit(0)


def slow(a: Tensor, b: Tensor) -> Tensor:
    """Right, and slow on the whole batch, for which the other processes wait."""
    if dist.get_world_size() == 1:
        time.sleep(0.5)
    return right(a, b)


def __getattr__(name: str) -> object:
    """`missing_on_one`, which process 1 cannot load."""
    if name == "missing_on_one" and os.environ["RANK"] != "1":
        return right
    raise AttributeError(f"module 'tests.planted' has no attribute {name!r}")


def constant(z: Tensor) -> Tensor:
    return z.detach().sum()


def rows(z: Tensor) -> Tensor:
    return z.sum((0, 2))


def three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a.sum() + b.sum() + c.sum()


instance = RightModule()
number = 3
