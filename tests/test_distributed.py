"""Collectives with their adjoints, the global batch norm, and flags: W = 1 to 4, different data."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp_ssl import distributed
from ddp_ssl.distributed import MeshComm, StopFlag, ViewLayout, World, comm_of
from tests.helpers import assert_same_gradients
from tests.ranks import Ranks

MESHES = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4)]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gather_and_sum(world: World, view_shards: int) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    x = some(4, 12, 5)
    n = 12 // comm.data_shards
    mine = x[comm.views, comm.rows(n)].clone().requires_grad_()
    everyone = comm.gather(mine)
    # Every rank uses all of x in its own way, so the adjoint must sum over ranks.
    weight = some(4, 12, 5, seed=1 + world.rank)
    ((everyone * weight).sum() + (comm.sum(mine.sum((0, 1))) * weight[0, 0]).sum()).backward()
    return everyone.detach(), mine.grad


@pytest.mark.parametrize(("size", "view_shards"), MESHES)
def test_gather_is_canonical_and_its_gradient_sums_over_ranks(
    ranks: Ranks, size: int, view_shards: int
) -> None:
    results = ranks.run(gather_and_sum, size, view_shards)
    x, weights = some(4, 12, 5), [some(4, 12, 5, seed=1 + r) for r in range(size)]
    gradient = sum(weights) + sum(w[0, 0] for w in weights)
    groups, n = size // view_shards, 12 // (size // view_shards)
    for rank, (everyone, grad) in enumerate(results):
        assert torch.equal(everyone, x)
        part = slice(rank // view_shards * n, (rank // view_shards + 1) * n)
        assert groups * n == 12
        torch.testing.assert_close(grad, gradient[rank % view_shards :: view_shards, part])


def listens_on(world: World) -> set[str]:
    """Local addresses, in hex, of the TCP sockets that this process listens on."""
    own = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(os.readlink(link))
    world.barrier()
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in own:
                found.add(local.partition(":")[0])
    return found


def test_one_machines_processes_listen_on_loopback_alone(ranks: Ranks) -> None:
    store, *others = ranks.run(listens_on, 3)
    assert "0100007F" in store
    assert all(found <= {"0100007F"} for found in (store, *others))


def view_sums(world: World) -> Any:
    comm = MeshComm(world, 2)
    x = torch.tensor([float(10**world.rank)], requires_grad=True)
    total = comm.view_sum(x)
    (total * (world.rank + 1)).backward()
    return float(total), float(x.grad[0])


def test_view_sum_stays_in_the_view_group(ranks: Ranks) -> None:
    assert ranks.run(view_sums, 4) == [(11, 3), (11, 3), (1100, 7), (1100, 7)]


def test_view_shards_must_divide_the_world() -> None:
    world = World(0, 3, 0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 view shards do not divide 3"):
        MeshComm(world, 2)


# --- batch norm ------------------------------------------------------------------------------


def network(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    momentum, affine = (None if kind == "cumulative" else 0.3), kind != "without affine"
    norm = nn.BatchNorm2d(5, momentum=momentum, affine=affine)
    return nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten())


def inputs(kind: str, views: int) -> Tensor:
    x = some(views, 12, 6) if kind == "linear" else some(views, 12, 3, 6, 6)
    return x * torch.linspace(0.2, 3, 12, dtype=torch.float64).view(1, -1, *[1] * (x.dim() - 2)) + 5


def reference_norm(kind: str, separate: bool) -> Any:
    """torch's own batch norm on the whole batch, one call per view or one for all."""
    net, x = network(kind).double().train(), inputs(kind, 4)
    out = torch.stack([net(v) for v in x]) if separate else net(x.flatten(0, 1)).view(4, 12, -1)
    loss = (out.pow(3).mean((0, 1)) * torch.arange(1, out.shape[-1] + 1)).sum()
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()], list(net.buffers())


class Kernels:
    """What torch's kernels of a synchronised batch norm compute, as formulas, for a CPU."""

    @staticmethod
    def _shape(x: Tensor) -> tuple[int, ...]:
        return (1, -1, *[1] * (x.dim() - 2))

    @staticmethod
    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows = x.transpose(0, 1).flatten(1)
        return rows.mean(1), (rows.var(1, unbiased=False) + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        like: Tensor, means: Tensor, inverses: Tensor, running_mean: Tensor | None,
        running_var: Tensor | None, momentum: float, eps: float, counts: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        number = counts.sum()
        share = (counts / number)[:, None]
        mean = (share * means).sum(0)
        variance = (share * (inverses.pow(-2) - eps + means.square())).sum(0) - mean.square()
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * number / (number - 1), momentum)
        return mean, (variance + eps).rsqrt()

    @classmethod
    def batch_norm_elemt(
        cls, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor,
        eps: float, out: Tensor,
    ) -> Tensor:  # fmt: skip
        shape = cls._shape(x)
        y = (x - mean.view(shape)) * inverse.view(shape)
        if weight is not None and bias is not None:
            y = y * weight.view(shape) + bias.view(shape)
        return out.copy_(y)

    @classmethod
    def batch_norm_backward_reduce(
        cls, grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None,
        input_g: bool, weight_g: bool, bias_g: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        dims = [d for d in range(x.dim()) if d != 1]
        first, second = grad.sum(dims), (grad * (x - mean.view(cls._shape(x)))).sum(dims)
        return (
            first, second, second * inverse if weight_g else None, first.clone() if bias_g else None
        )  # fmt: skip

    @classmethod
    def batch_norm_backward_elemt(
        cls, grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None,
        sum_grad: Tensor, sum_grad_x: Tensor, counts: Tensor,
    ) -> Tensor:  # fmt: skip
        shape, number = cls._shape(x), counts.sum()
        slope = (inverse.square() * sum_grad_x / number).view(shape)
        out = grad - (sum_grad / number).view(shape) - (x - mean.view(shape)) * slope
        return out * (inverse if weight is None else inverse * weight).view(shape)


@contextlib.contextmanager
def with_kernels() -> Iterator[None]:
    """In this context tensors on a CPU take the code path of a GPU."""
    with contextlib.ExitStack() as stack:
        for name in (n for n in vars(Kernels) if n.startswith("batch_norm")):
            stack.enter_context(patch.object(torch, name, getattr(Kernels, name)))
        stack.enter_context(patch.object(distributed.batch_norm, "_has_kernels", lambda x: True))
        yield


def global_norm_on_a_gpu(*how: Any) -> Any:
    with with_kernels():
        return global_norm(*how)


def compiled_global_norm(*how: Any) -> Any:
    """In one graph, whose operators are run one after the other (no compiler of C++ is needed)."""

    def in_one_graph(net: nn.Module) -> None:
        torch.compiler.reset()
        net.compile(backend="aot_eager", fullgraph=True, dynamic=False)

    return global_norm(*how, prepare=in_one_graph)


def global_norm(
    world: World,
    view_shards: int,
    kind: str,
    separate: bool,
    last: bool,
    prepare: Callable[[nn.Module], None] = lambda net: None,
) -> Any:
    fmt = torch.channels_last if last else torch.contiguous_format
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    layout = ViewLayout()
    net = distributed.global_batch_norm(network(kind).double(), layout).to(memory_format=fmt)
    net.train()
    prepare(net)
    module = DDP(net, broadcast_buffers=False) if world.size > 1 else net
    n = 12 // comm.data_shards
    mine = inputs(kind, 4)[comm.views, comm.rows(n)]
    total, held = (4, comm.views) if separate else (1, slice(None))
    stacked = mine.flatten(0, 1)
    if stacked.dim() == 4:
        stacked = stacked.contiguous(memory_format=fmt)
    with distributed.stacked_views(layout, total, held):
        out = module(stacked).view(mine.shape[0], n, -1)
    loss = (out.pow(3).mean((0, 1)) * torch.arange(1, out.shape[-1] + 1)).sum()
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()], list(net.buffers())


@pytest.mark.parametrize("norm", [global_norm, global_norm_on_a_gpu])
@pytest.mark.parametrize("kind", ["linear", "conv", "cumulative", "without affine"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(("size", "view_shards"), MESHES)
def test_global_batch_norm_is_torchs_on_the_whole_batch(
    ranks: Ranks, norm: Any, kind: str, separate: bool, size: int, view_shards: int
) -> None:
    assert_equal_reference(
        ranks.run(norm, size, view_shards, kind, separate, size != 2), kind, separate
    )


@pytest.mark.parametrize(
    ("size", "view_shards", "kind"),
    [(1, 1, "linear"), (2, 1, "conv"), (2, 2, "cumulative"), (4, 2, "conv")],
)
def test_compiled_global_batch_norm_is_torchs_on_the_whole_batch(
    ranks: Ranks, kind: str, size: int, view_shards: int
) -> None:
    """Forward, backward, collectives and running averages of one graph without a break."""
    results = ranks.run(compiled_global_norm, size, view_shards, kind, True, size != 2)
    assert_equal_reference(results, kind, True)


def assert_equal_reference(results: list[Any], kind: str, separate: bool) -> None:
    loss, gradients, buffers = reference_norm(kind, separate)
    size = len(results)
    mean = sum(result[0] for result in results) / size
    assert abs(mean - loss) <= 1e-12 * abs(loss)
    for _, grads, stats in results:
        assert_same_gradients(grads, gradients)
        for a, b, first in zip(stats, buffers, results[0][2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
            assert torch.equal(a, first)  # the same bits on every rank


def test_batch_norm_keeps_precision_far_from_zero() -> None:
    """Float32 features with a mean 1,000 times their spread."""
    x = some(64, 5).float() + 1000
    norm = nn.BatchNorm1d(5).train()
    ours = distributed.global_batch_norm(nn.BatchNorm1d(5), ViewLayout()).train()
    exact = nn.BatchNorm1d(5).double().train()(x.double())
    assert (ours(x) - exact).abs().max() < 2 * (norm(x) - exact).abs().max() + 1e-3


def test_batch_norm_in_eval_mode_is_torchs() -> None:
    plain = nn.BatchNorm2d(3).double()
    plain(some(4, 3, 5, 5))
    ours = distributed.global_batch_norm(plain.eval(), ViewLayout()).eval()
    x = some(4, 3, 5, 5, seed=7)
    assert torch.equal(ours(x), plain(x))
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_batch_norm_takes_half_precision() -> None:
    norm = distributed.global_batch_norm(nn.BatchNorm2d(3), ViewLayout()).train()
    x = some(8, 3, 4, 4).bfloat16().requires_grad_()
    out = norm(x)
    out.float().square().mean().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 4, 4)])
def test_batch_norm_takes_any_strides(shape: tuple[int, ...]) -> None:
    """Some kernels give outputs that are dense, but neither contiguous nor channels-last."""
    x = some(*reversed(shape)).permute(*reversed(range(len(shape))))
    assert not x.is_contiguous()
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    norm = kind(shape[1]).double().train()
    ours = distributed.global_batch_norm(kind(shape[1]).double(), ViewLayout()).train()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = some(*shape, seed=2)
    (ours(a) * weight).sum().backward()
    (norm(b) * weight).sum().backward()
    torch.testing.assert_close(ours(x), norm(x))
    torch.testing.assert_close(a.grad, b.grad)


def with_activation(channels: int) -> nn.Module:
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(channels)


NORMS: dict[str, Any] = {
    "plain": nn.BatchNorm2d,
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
    "without affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "without averages": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "frozen": lambda c: nn.BatchNorm2d(c).requires_grad_(False),
    "with activation": with_activation,
    "linear": nn.BatchNorm1d,
    "sequence": nn.BatchNorm1d,
}
SHAPES = {"linear": (24, 5), "sequence": (24, 5, 9)}


def assert_same_averages(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0, check_dtype=False)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_kind_of_norm_on_the_way_of_a_gpu(kind: str, compiled: bool) -> None:
    """One process, two views, each by its own statistics."""
    x, weight = (some(*SHAPES.get(kind, (24, 5, 6, 7)), seed=seed) * 3 + 2 for seed in (0, 2))
    plain, layout = NORMS[kind](5).double().train(), ViewLayout()
    ours = copy.deepcopy(distributed.global_batch_norm(NORMS[kind](5), layout)).double().train()
    ours.layout = layout
    if compiled:
        torch.compiler.reset()
        ours.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    torch.cat([plain(view) for view in a.chunk(2)]).mul(weight).sum().backward()
    with with_kernels(), distributed.stacked_views(layout, 2, slice(None)):
        (ours(b) * weight).sum().backward()
    torch.testing.assert_close(b.grad, a.grad)
    assert_same_averages(ours, plain)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or q.grad is None or torch.allclose(p.grad, q.grad)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_averages_of_a_layer_that_is_used_several_times(momentum: float | None) -> None:
    """Twice within one context, within another inside it, in one that fails, and outside."""
    plain, layout = nn.BatchNorm1d(4, momentum=momentum).double().train(), ViewLayout()
    ours = distributed.global_batch_norm(nn.BatchNorm1d(4, momentum=momentum).double(), layout)
    batches = [some(6, 4, seed=seed) + seed for seed in range(5)]
    with with_kernels(), torch.no_grad():
        with distributed.stacked_views(layout, 1, slice(None)):
            ours(batches[0])
            ours(batches[1])
            with distributed.stacked_views(layout, 1, slice(None)):
                ours(batches[2])
            ours(batches[3])
        ours(batches[4])
        with (
            contextlib.suppress(KeyError),
            distributed.stacked_views(layout, 1, slice(None)),
        ):
            ours(batches[0])
            raise KeyError
    assert layout == ViewLayout()
    with torch.no_grad():
        for batch in batches:
            plain(batch)
    assert_same_averages(ours, plain)


def test_batches_that_have_no_statistics_are_refused() -> None:
    layout = ViewLayout()
    ours = distributed.global_batch_norm(nn.BatchNorm1d(4).double(), layout).train()
    with with_kernels():
        with pytest.raises(ValueError, match="more than one value per channel"):
            ours(some(1, 4))
        with (
            distributed.stacked_views(layout, 2, slice(None)),
            pytest.raises(ValueError, match="5"),
        ):
            ours(some(5, 4))


@pytest.mark.parametrize("processes", [1, 8, 512, 4096])
def test_counts_of_32_bits(processes: int) -> None:
    """512 images of 112 x 112 on 512 processes are 3.3e9 values a channel."""
    value, count = distributed.batch_norm._counts(512 * 112 * 112, processes)
    tensor = torch.full((count,), value, dtype=torch.int32)
    assert int(tensor.sum()) == 512 * 112 * 112 * processes


def test_averages_in_another_precision() -> None:
    ours = distributed.global_batch_norm(nn.BatchNorm1d(4).double(), ViewLayout()).train()
    plain = nn.BatchNorm1d(4).double().train()
    x = some(6, 4)
    with with_kernels(), torch.no_grad():
        ours.weight.data, ours.bias.data = ours.weight.float(), ours.bias.float()
        ours(x.float())
        plain(x)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- flags -----------------------------------------------------------------------------------


def raise_flags(world: World) -> Any:
    late = StopFlag(world)
    seen = [late.exchange(step == 2 and world.rank == world.size - 1) for step in range(5)]
    return seen, late.wait()


@pytest.mark.parametrize("size", [1, 3])
def test_flags_are_seen_by_all_at_the_same_step(ranks: Ranks, size: int) -> None:
    results = ranks.run(raise_flags, size)
    first = 2 if size == 1 else 3  # one step late among several
    assert results == [([step >= first for step in range(5)], True)] * size


def raise_now(world: World, step: int) -> list[bool]:
    """Rank 0 raises its flag at `step`. At step 3 all wait for the flags of that step."""
    late = StopFlag(world)
    flags = [world.is_main and s == step for s in range(4)]
    return [*[late.exchange(flag) for flag in flags[:3]], late.now(flags[3])]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_flag_is_seen_at_once_where_it_matters(ranks: Ranks, size: int) -> None:
    """The flag of this step, of the step before (still under way), and of earlier ones."""
    assert ranks.run(raise_now, size, 9) == [[False] * 4] * size
    for step in range(4):
        seen = ranks.run(raise_now, size, step)
        assert seen == [seen[0]] * size
        assert seen[0][3]


def any_raised(world: World) -> list[bool]:
    return [world.any(False), world.any(world.rank == world.size - 1), world.any(False)]


@pytest.mark.parametrize("size", [1, 3])
def test_whether_any_process_has_raised_its_flag(ranks: Ranks, size: int) -> None:
    assert ranks.run(any_raised, size) == [[False, True, False]] * size


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([], None),
        (["cpu", "cpu"], None),
        (["cuda 1a", "cuda 1b"], None),
        (["cuda 1a", "cpu"], "rank 1 finds no GPU"),
        (["cpu", "cuda 1a", "cuda 1a"], "rank 0 finds no GPU"),
        (["cuda 1a", "cuda 1b", "cuda 1a"], "ranks 0 and 2 share one GPU (cuda 1a)"),
    ],
)
def test_places_that_cannot_work_together(places: Any, words: str | None) -> None:
    found = distributed.world._conflict(places)
    assert (found is None) == (words is None)
    assert words is None or words in str(found)


def objects(world: World) -> Any:
    gathered = world.gather_objects({"rank": world.rank})
    return (
        gathered,
        world.broadcast_object(f"from {world.rank}"),
        comm_of(world).broadcast(world.rank + 0.1),
    )


def test_objects_and_broadcast(ranks: Ranks) -> None:
    results = ranks.run(objects, 3)
    assert results[0][0] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert [r[0] for r in results[1:]] == [None, None]
    assert {r[1:] for r in results} == {("from 0", 0.1)}


def gradients(world: World, compression: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 1))
    parallel = distributed.data_parallel(net, world, compression)
    distributed.comm_stats.counts.clear()
    sent, reduce = 0, torch.distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return reduce(tensor, *args, **options)

    # Where DDP's hook for bf16 looks it up; without a hook DDP reduces elsewhere.
    with patch.object(torch.distributed, "all_reduce", counting):
        parallel(some(9, 6, seed=world.rank).float()).square().mean().backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    return found, sent, distributed.comm_stats.counts["gradients"][1]


def test_compressed_gradients_are_rounded_and_equal_everywhere(ranks: Ranks) -> None:
    exact, _, nbytes = ranks.run(gradients, 3, None)[0]
    results = ranks.run(gradients, 3, "bf16")
    for found, sent, counted in results:
        assert torch.equal(found, results[0][0])
        assert 2 * sent == 2 * counted == nbytes == 4 * exact.numel()
        assert 1e-4 < float((found - exact).norm() / exact.norm()) < 1e-2


def last_timed(world: World) -> int:
    parallel = distributed.data_parallel(nn.Linear(2, 1), world)
    for _ in range(120):
        parallel(torch.ones(1, 2)).sum().backward()
    return int(parallel._get_ddp_logging_data()["iteration"])


def test_ddp_times_its_first_steps_alone(ranks: Ranks) -> None:
    """On a GPU the host waits for what it times; of itself DDP does so in every 100th step."""
    assert ranks.run(last_timed, 2) == [10, 10]


@pytest.fixture(scope="module")
def nccl() -> Iterator[None]:
    """A group of this process alone, so that the global path runs."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_global_batch_norm_on_a_gpu_is_torchs_on_a_cpu(
    nccl: None, kind: str, dtype: torch.dtype, last: bool, reduce: bool, views: int
) -> None:
    """Views by their own statistics, or pooled; in float64 on the CPU, one call per view."""
    shape = SHAPES.get(kind, (24, 5, 6, 7))
    fmt = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    x = (some(*shape) * 3 + 2).to(dtype).to(memory_format=fmt)
    weight = some(*shape, seed=2).to(dtype).to(memory_format=fmt)
    plain, layout = NORMS[kind](5).double().train(), ViewLayout()
    ours = distributed.global_batch_norm(NORMS[kind](5), layout, reduce).cuda().train()
    a, b = x.double().requires_grad_(), x.cuda().requires_grad_()
    torch.cat([plain(view) for view in a.chunk(views)]).mul(weight.double()).sum().backward()
    with distributed.stacked_views(layout, views, slice(None)):
        out = ours(b)
    (out * weight.cuda()).sum().backward()
    assert b.grad is not None
    assert out.dtype == b.grad.dtype == dtype
    assert out.is_contiguous(memory_format=fmt)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(b.grad.double().cpu(), a.grad, **close)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(
            dict(ours.named_buffers())[name].cpu(), buffer, check_dtype=False, **close
        )
    if plain.affine and plain.weight.requires_grad:
        torch.testing.assert_close(ours.weight.grad.cpu().double(), plain.weight.grad, **close)
        torch.testing.assert_close(ours.bias.grad.cpu().double(), plain.bias.grad, **close)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_global_batch_norm_equals_sync_batch_norm_on_a_gpu(nccl: None) -> None:
    norm = nn.BatchNorm2d(5).cuda()
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(norm).train()
    ours = distributed.global_batch_norm(nn.BatchNorm2d(5), ViewLayout()).cuda().train()
    x = some(8, 5, 6, 6).float().cuda().requires_grad_()
    y = x.detach().clone().requires_grad_()
    # Alone, the module itself would take the way of a plain batch norm.
    theirs = torch.nn.modules._functions.SyncBatchNorm.apply(
        y, sync.weight, sync.bias, sync.running_mean, sync.running_var, sync.eps, sync.momentum,
        torch.distributed.group.WORLD, 1,
    )  # fmt: skip
    sync.num_batches_tracked.add_(1)
    out = ours(x)
    out.pow(3).mean().backward()
    theirs.pow(3).mean().backward()
    torch.testing.assert_close(out, theirs)
    torch.testing.assert_close(x.grad, y.grad)
    for p, q in zip(ours.parameters(), sync.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(ours.buffers(), sync.buffers(), strict=True):
        torch.testing.assert_close(p, q)
