"""Process groups, the data x view mesh, and every collective with its adjoint.

The only module that imports `torch.distributed`. The rule behind it: if each collective is
differentiated as its true adjoint (gather <-> sum of the cotangents over ranks, own slice;
all-reduce <-> all-reduce) and rank r calls backward on its own l_r, then the gradient that DDP
averages is exactly the gradient of mean_r l_r. So a loss only has to satisfy mean_r l_r = L_global,
and no factor of the world size appears anywhere. docs/distributed.md derives it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ddp_ssl import clock
from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.driver import why_no_gpu
from ddp_ssl.launch import local_rank_and_size, ranges, rank_and_size, restarts

# torch 2.13 renamed the single-tensor collectives and deprecated the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# --- meeting the others ------------------------------------------------------------------------


class Traffic:
    """How often this process met the others, and, while `sampling`, how long it waited for them.

    The slowest process waits least: it is the one the others wait for.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.counts: dict[str, tuple[int, int]] = {}
        self.sampling = False
        self._spans: list[tuple[Any, Any]] = []
        self._ready: Any = None
        self._device = torch.device("cpu")

    def count(self, kind: str, nbytes: int, calls: int = 1) -> None:
        """Add to `counts`, by kind: calls, and bytes of the whole tensors that were reduced,
        gathered or scattered, whatever part of them the backend sends. Integers on the host only.

        `norm`, `sum`, `view sum`, `gather`, `scatter` (a gather's adjoint), `gradients` (bytes
        alone: DDP makes the calls), `flag`, `log`, `host` (objects count as zero bytes).
        """
        before = self.counts.get(kind, (0, 0))
        self.counts[kind] = before[0] + calls, before[1] + nbytes

    def sample(self, device: torch.device) -> None:
        """Measure from here on, until `waited`."""
        self.sampling, self._device = True, device
        self._spans, self._ready = [], None

    def mark(self) -> Any:
        """This moment, on the device's own clock."""
        return clock.now(self._device)

    def span(self, start: Any) -> None:
        """Count the time since `start` as waiting."""
        self._spans.append((start, self.mark()))

    def gradient_ready(self, parameter: Tensor, itemsize: int | None = None) -> None:
        """This process's part of a gradient is there; the last one's moment counts."""
        self.count("gradients", parameter.numel() * (itemsize or parameter.itemsize), calls=0)
        if self.sampling:
            self._ready = self.mark()

    def gradients_reduced(self) -> None:
        """After backward: since the last gradient was ready here, DDP waited for the others'."""
        if self.sampling and self._ready is not None:
            self.span(self._ready)

    def waited(self) -> float:
        """Seconds spent waiting while sampling, which ends here; waits for the device."""
        self.sampling = False
        spans, self._spans = self._spans, []
        return sum(clock.seconds_between(start, end) for start, end in spans)


traffic = Traffic()


def _meet(kind: str, collective: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Run a collective that this process waits for."""
    traffic.calls += 1
    traffic.count(kind, max((a.nbytes for a in args if isinstance(a, Tensor)), default=0))
    if not traffic.sampling:
        collective(*args, **options)
        return
    start = traffic.mark()
    collective(*args, **options)
    traffic.span(start)


def others_failed(error: BaseException) -> bool:
    """Whether this is what a process sees when another one died or left."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection", "timed out", "socket", "store")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )


# --- the world ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among all processes, and what they talk through."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    side: Any = None
    """A gloo group for flags and waiting, so that neither blocks the device."""
    timeout: datetime.timedelta | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def gather_objects(self, value: Any) -> list[Any] | None:
        """Every process's picklable value on rank 0, in rank order; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        _meet("host", dist.gather_object, value, values, dst=0, group=self.side)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable value on every process."""
        if self.size == 1:
            return value
        box = [value]
        _meet("host", dist.broadcast_object_list, box, src=0, group=self.side)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether any process has it raised; waits for the device.

        There, since a sum over the hosts goes around a ring of all of them twice.
        """
        if self.size == 1:
            return flag
        raised = torch.tensor([float(flag)], device=self.device)
        _meet("flag", dist.all_reduce, raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def barrier(self) -> None:
        """Wait for every process, on the host."""
        if self.size > 1:
            _meet("host", dist.barrier, group=self.side)

    def mean_rows(self, rows: Tensor) -> Tensor:
        """Mean over processes of a tensor on the device."""
        if self.size > 1:
            _meet("log", dist.all_reduce, rows)
            rows = rows / self.size
        return rows

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every process's numbers on every process, in rank order; on the host."""
        mine = torch.tensor([numbers], dtype=torch.float64)
        if self.size == 1:
            return cast(list[list[float]], mine.tolist())
        everyones = mine.new_empty(self.size, len(numbers))
        _meet("host", _all_gather, everyones, mine, group=self.side)
        return cast(list[list[float]], everyones.tolist())

    def whiteboard(self, answer_within_s: float) -> Whiteboard | None:
        """Where the processes leave notes for each other; None for one process."""
        if self.size == 1:
            return None
        token = self.broadcast_object(os.urandom(8).hex())  # apart from those of an earlier start
        return Whiteboard(token, self.size, answer_within_s)


class Whiteboard:
    """A note of every process, read without the others' help, through a connection of its own.

    The launcher's store behind it lives in torchrun's first agent, or in rank 0 under srun.
    Methods raise `RuntimeError` once it cannot be reached.
    """

    def __init__(self, token: str, size: int, answer_within_s: float) -> None:
        self._token, self._size, self._within = token, size, answer_within_s
        self._store: Any = None
        self._asking: threading.Thread | None = None
        self.outlives_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def _connect(self) -> Any:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        within = datetime.timedelta(seconds=self._within)
        store = dist.TCPStore(host, port, timeout=within)  # type: ignore[attr-defined]
        notes = PrefixStore(f"notes {self._token}", store)
        notes.set_timeout(within)
        return notes

    def write(self, rank: int, note: str) -> None:
        """Replace this process's note."""
        self._ask(lambda store: store.set(str(rank), note))

    def read(self) -> list[str]:
        """The notes of all processes in rank order; each must have written one."""
        names = [str(rank) for rank in range(self._size)]
        notes = self._ask(lambda store: store.multi_get(names))
        return [note.decode() for note in notes]

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """The store's answer, within the time for it.

        The store's own timeout does not help where the process behind it is stopped: it then waits
        for the answer to its cancellation. A question that is not answered may be in time for the
        next one; a connection that broke is made anew.
        """
        answer: list[Any] = []

        def ask() -> None:
            try:
                self._store = self._store or self._connect()
                answer.append(question(self._store))
            except Exception:  # whatever it is, there is no answer
                self._store = None

        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=ask, daemon=True)
            self._asking.start()
            self._asking.join(self._within)
        if not answer:
            raise RuntimeError("the rendezvous store does not answer")
        return answer[0]


class LateFlag:
    """A flag that any process may raise and that all see raised at the same step.

    The all-reduce runs in the background on the side group and is read one step late, so that a
    step never waits for it.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.raised = False
        self._tensor = torch.zeros(1)
        self._work: Any = None

    def exchange(self, flag: bool) -> bool:
        """Send this step's flag; returns whether any process had raised its flag a step ago."""
        if self.world.size == 1:
            self.raised = self.raised or flag
            return self.raised
        if self._work is not None:
            self._work.wait()
            self.raised = self.raised or bool(self._tensor.item())
        self._tensor = torch.full((1,), float(flag))
        traffic.count("flag", self._tensor.nbytes)
        self._work = dist.all_reduce(
            self._tensor, dist.ReduceOp.MAX, group=self.world.side, async_op=True
        )
        return self.raised

    def now(self, flag: bool) -> bool:
        """The same without delay; waits for the device."""
        before = self.settle()
        self.raised = self.world.any(flag or before)
        return self.raised

    def settle(self) -> bool:
        """Wait for the flag in flight: the same answer on every process."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self.raised = self.raised or bool(self._tensor.item())
        return self.raised


def start(device: str = "auto", timeout_s: float = 1800) -> World:
    """Join the process group that the launcher describes; one process needs none.

    Reads torchrun's variables, or Slurm's when `srun` starts one task per GPU. `device` is `auto`,
    `cuda` or `cpu`; `auto` is the CPU only where no GPU is meant (`driver.py`). Raises `ValueError`
    (with several ranks `Disagreement`, on all of them) if a rank lacks the GPU that is asked for or
    meant for it, if some have a GPU and others none, or if two share one.
    """
    rank, size = rank_and_size()
    local_rank, local_size = local_rank_and_size()
    traffic.calls = 0
    traffic.counts.clear()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about an old driver: `why_no_gpu` says more
        use_cuda = device != "cpu" and torch.cuda.is_available()
    missing = None
    if device != "cpu" and not use_cuda:
        missing = why_no_gpu(torch.__version__, torch.version.cuda)
    if device == "cuda" and not use_cuda:
        missing = f"cuda is not available here; {missing or 'auto or cpu would be accepted'}"
    if use_cuda:
        # --gpus-per-task shows each task one GPU, so the local rank can exceed the count.
        place = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
    if size == 1:
        if missing:
            raise ValueError(f"run.device: {missing}")
        return World(0, 1, 0, 1, place)

    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            "MASTER_ADDR, MASTER_PORT: not set, so the processes cannot find each other; start "
            "with torchrun, or export both"
        )
    timeout = datetime.timedelta(seconds=timeout_s)
    # NCCL connects at the first collective on a GPU, so the check below runs before it.
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    # torchrun may keep one store over its restarts, with the dead processes' addresses in it. On
    # several nodes its agents count restarts each for itself, so the count cannot be used there.
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = PrefixStore(f"start {restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    side = dist.new_group(backend="gloo", timeout=timeout)
    world = World(rank, size, local_rank, local_size, place, side, timeout)
    found = world.gather_objects((_place(place), socket.gethostname(), missing)) or []
    lacking = [
        f"run.device: rank {lacks} ({host}): {reason}"
        for lacks, (_, host, reason) in enumerate(found)
        if reason
    ]
    conflict = _conflict([where for where, _, _ in found])
    problem = world.broadcast_object(lacking[0] if lacking else conflict)
    if problem:
        raise Disagreement(problem)
    return world


class Disagreement(ValueError):
    """The processes, all together, found that they cannot work together."""


def _place(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    # The index says nothing where every task sees its own GPU as the first (srun --gpus-per-task).
    return f"cuda {socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _conflict(places: list[str]) -> str | None:
    """Why processes in these places cannot work together, or None."""
    on_gpu = [place for place in places if place.startswith("cuda")]
    if on_gpu and len(on_gpu) < len(places):
        first = next(r for r, place in enumerate(places) if place == "cpu")
        return f"run.device: rank {first} finds no GPU, others do; run.device=cpu serves all"
    for rank, place in enumerate(on_gpu):
        if place in on_gpu[:rank]:
            return (
                f"run.device: ranks {on_gpu.index(place)} and {rank} share one GPU ({place}); "
                "start one process per GPU, or run.device=cpu"
            )
    return None


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def layout(world: World) -> list[str]:
    """`HOST DEVICE cpus 0-3` of every rank, on rank 0 (empty elsewhere)."""
    name = str(world.device)
    if world.device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(world.device)})"
    cpus = ranges(os.sched_getaffinity(0))
    return world.gather_objects(f"{socket.gethostname()} {name} cpus {cpus}") or []


def data_parallel(
    module: nn.Module, world: World, compression: Literal["bf16"] | None = None
) -> nn.Module:
    """The module under DDP, where there is a process group; buffers are global already.

    `compression`: what gradients are sent in, if not as they are.
    """
    if not dist.is_initialized():
        return module
    ids = [world.device.index] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    # The same meaning under torch's older and newer name.
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


# --- how well they talk: for `ddp-ssl doctor` ------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """What a measured all-reduce gave here."""

    backend: str
    nbytes: int
    seconds: float
    """Of one all-reduce of `nbytes`, the best of a few."""
    latency: float
    """Seconds of one all-reduce of four bytes, the median."""
    correct: bool
    """Whether every sum was right."""
    link: float
    """Seconds until as many bytes from the rank before were here while all ranks sent; the best."""


def bandwidth(world: World, device: torch.device, nbytes: int, timeout_s: float) -> Exchange:
    """Measure an all-reduce between all processes: NCCL on GPUs, gloo on CPUs.

    For all processes together, each with a GPU of its own or none. In a group of its own, so that
    a failure (`RuntimeError`, after `timeout_s` at the latest) leaves the others usable.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=timeout_s)
    group: Any = dist.new_group(backend=backend, timeout=limit)
    try:
        total, count = world.size * (world.size + 1) / 2, nbytes // 4
        correct = True

        def settle() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        def timed(elements: int) -> float:
            nonlocal correct
            values = torch.full((elements,), float(world.rank + 1), device=device)
            settle()
            start = time.perf_counter()
            dist.all_reduce(values, group=group)
            settle()
            seconds = time.perf_counter() - start
            correct = correct and bool((values == total).all())
            return seconds

        sent = torch.ones(count, device=device)
        received = torch.empty_like(sent)
        after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size

        def around() -> float:
            settle()
            start = time.perf_counter()
            both = [
                dist.P2POp(dist.irecv, received, before, group),
                dist.P2POp(dist.isend, sent, after, group),
            ]
            waiting = dist.batch_isend_irecv(both)
            waiting[0].wait()
            settle()
            seconds = time.perf_counter() - start
            for work in waiting[1:]:
                work.wait()
            settle()
            return seconds

        timed(count)  # connects
        seconds = min(timed(count) for _ in range(3))
        latency = sorted(timed(1) for _ in range(21))[10]
        link = min(around() for _ in range(3))
        return Exchange(backend, count * 4, seconds, latency, correct, link)
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group(group)


def patient(world: World, timeout_s: float) -> World:
    """The same processes, with another limit on waiting for each other on the host."""
    if world.size == 1:
        return world
    limit = datetime.timedelta(seconds=timeout_s)
    return replace(world, side=dist.new_group(backend="gloo", timeout=limit), timeout=limit)


def wait_for_all(world: World, timeout_s: float) -> None:
    """Meet on the host. On rank 0 `RuntimeError` names the ranks that did not come in time.

    `timeout_s` may be less than the world's own limit, but not more.
    """
    if world.size > 1:
        limit = datetime.timedelta(seconds=timeout_s)
        dist.monitored_barrier(world.side, limit, wait_all_ranks=True)


# --- collectives with their adjoints -----------------------------------------------------------


class _Gather(torch.autograd.Function):
    """[n, ...] -> [W, n, ...]; backward is a reduce-scatter of the cotangents."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
        _meet("gather", _all_gather, out, x.contiguous())
        return out.view(-1, *x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        out = grad.new_empty(grad.shape[1:])
        _meet("scatter", _reduce_scatter, out, grad.contiguous().flatten(0, 1))
        return out


class _Sum(torch.autograd.Function):
    """All-reduce; backward is an all-reduce of the cotangents over the same group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        _meet("sum" if group is None else "view sum", dist.all_reduce, total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        _meet("sum" if ctx.group is None else "view sum", dist.all_reduce, total, group=ctx.group)
        return total, None


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
        self._view_side: Any = None  # gloo: what the hosts say to each other
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
        # A number first: nearly always there is nothing to tell.
        count = torch.tensor([len(found)])
        _meet("host", dist.all_reduce, count, group=self._view_side)
        if not int(count):
            return found
        everyones: list[Any] = [None] * self.view_shards
        # Not counted: other view groups do not come here, and all counts must agree.
        dist.all_gather_object(everyones, found, group=self._view_side)
        union: dict[int, str] = {}
        for part in everyones:
            union = part | union
        return union

    def broadcast(self, value: float) -> float:
        # On the side group: the others may wait here for a long computation on rank 0.
        return float(self.world.broadcast_object(value))


# --- batch normalisation over the global batch -------------------------------------------------


@dataclass
class ViewLayout:
    """Which views a stacked batch holds, told to every norm layer by `stacked_views`."""

    total: int = 1
    held: slice = field(default_factory=lambda: slice(None))
    statistics: dict[GlobalBatchNorm, _Statistics] | None = None
    """What norm layers on a GPU saw within `stacked_views`, for their running averages."""

    @property
    def local(self) -> int:
        """Number of views stacked here."""
        return len(range(self.total)[self.held])


@contextlib.contextmanager
def stacked_views(layout: ViewLayout, total: int, held: slice) -> Iterator[None]:
    """Within: batches are the views `held` stacked, of `total` over all view shards."""
    before = layout.total, layout.held, layout.statistics
    _update_averages(before[2])
    layout.total, layout.held, layout.statistics = total, held, {}
    try:
        yield
        _update_averages(layout.statistics)
    finally:
        layout.total, layout.held, layout.statistics = before


def _by_view(x: Tensor, views: int) -> tuple[Tensor, list[int], tuple[int, ...]]:
    """`x` `[views * n, C, ...]` by view, the dimensions to reduce, the shape of the statistics."""
    channels = x.shape[1]
    if x.dim() == 2:
        return x.reshape(views, -1, channels), [1], (-1, 1, channels)
    if x.dim() == 4 and _format(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).reshape(views, -1, channels), [1], (-1, 1, channels)
    shape = (views, x.shape[0] // views, channels, -1)
    return x.reshape(shape), [1, 3], (-1, 1, channels, 1)


def _format(x: Tensor) -> torch.memory_format:
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _affine(like: Tensor, views: int, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` for `x` from `_by_view`, as a fresh tensor laid out as `like`."""
    out = torch.empty_like(like, memory_format=_format(like))
    rows = _by_view(out, views)[0]
    assert rows.data_ptr() == out.data_ptr()  # a view, not a copy: what is written there is `out`
    if out.dtype == x.dtype:
        torch.addcmul(shift, x, scale, out=rows)
    else:
        rows.copy_(torch.addcmul(shift, x, scale))
    return out


class _NormalizeOnCPU(torch.autograd.Function):
    """Normalise each view by its statistics over all processes, in torch's generic operators.

    Returns the output and, for the running averages, mean and unbiased variance `[total, C]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        layout: ViewLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels, total, held, views = x.shape[1], layout.total, layout.held, layout.local
        rows, dims, shape = _by_view(x, views)
        work = rows.to(torch.promote_types(x.dtype, torch.float32))
        count = rows.numel() // (views * channels)
        # Local mean and centred squares in the working precision, combined in float64: no
        # cancellation however large the mean, and one all-reduce.
        mean = work.mean(dims).double()
        squares = (work - mean.to(work.dtype).view(shape)).square_().sum(dims).double()
        moments = x.new_zeros((total, 2 * channels + 1), dtype=torch.float64)
        moments[held, 0] = count
        moments[held, 1 : channels + 1] = count * mean
        moments[held, channels + 1 :] = squares + count * mean.square()
        _meet("norm", dist.all_reduce, moments)
        number = moments[:, :1]
        means = moments[:, 1 : channels + 1] / number
        variances = (moments[:, channels + 1 :] / number - means.square()).clamp_(min=0)

        mean = means[held]
        inverse = (variances[held] + eps).rsqrt()
        scale = inverse * weight.double()
        shift = bias.double() - mean * scale
        kind = work.dtype
        out = _affine(x, views, work, scale.to(kind).view(shape), shift.to(kind).view(shape))
        ctx.save_for_backward(x, weight, mean, inverse, number)
        ctx.total, ctx.held, ctx.views = total, held, views
        unbiased = variances * (number / (number - 1).clamp(min=1))
        ctx.mark_non_differentiable(means, unbiased)
        return out, means, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, number = ctx.saved_tensors
        channels, held, views = x.shape[1], ctx.held, ctx.views
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

        sums = x.new_zeros((ctx.total, 2 * channels), dtype=torch.float64)
        sums[held] = torch.cat([sum_grad, sum_grad_x], 1)
        _meet("norm", dist.all_reduce, sums)
        mean_grad, mean_grad_x = (sums[held] / number[held]).split(channels, 1)
        # dx = w/s (g - mean g - x^ mean(g x^)), written as one affine map of g and x per channel.
        scale = inverse * weight.double()
        slope = -scale * inverse * mean_grad_x
        offset = -scale * mean_grad - mean * slope
        offset_rows = torch.addcmul(
            offset.to(kind).view(shape), grad_rows, scale.to(kind).view(shape)
        )
        return (
            _affine(x, views, work, slope.to(kind).view(shape), offset_rows),
            sum_grad_x.sum(0).to(weight.dtype),  # DDP averages what each rank contributed
            sum_grad.sum(0).to(weight.dtype),
            None,
            None,
        )


class _Statistics(NamedTuple):
    """What a norm layer saw of `number` rows: mean and inverse deviation `[C]` of each view."""

    norm: GlobalBatchNorm
    means: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]
    number: int


class _NormalizeOnGPU(torch.autograd.Function):
    """The same with the kernels that `nn.SyncBatchNorm` uses, each view a slice of the batch.

    One gather per layer for all views, and one all-reduce in backward; neither without `reduce`,
    where the statistics are this process's own. The kernels take a row of statistics of any length,
    so that all views are merged in one call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: GlobalBatchNorm,
        layout: ViewLayout,
        reduce: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=_format(x))
        local, channels, eps = layout.local, x.shape[1], norm.eps
        total, held = (layout.total, layout.held) if reduce else (local, slice(None))
        views = x.chunk(local)
        rows = views[0].numel() // channels
        if len(x) % local:
            raise ValueError(f"{len(x)} images are not {local} views of as many images each")
        own = [torch.batch_norm_stats(view, eps) for view in views]
        packed = torch.cat([part for kind in zip(*own, strict=True) for part in kind])[None]
        if reduce:
            everyones = packed.new_empty(dist.get_world_size(), packed.shape[1])
            _meet("norm", _all_gather, everyones, packed)
            packed = everyones
            if total > local:  # [data shard, view shard, kind, view, C]: view shards into the row
                apart = packed.view(-1, total // local, 2, local, channels)
                packed = apart.permute(0, 2, 3, 1, 4).reshape(len(apart), -1)
        if rows * len(packed) == 1:
            raise ValueError(f"expected more than one value per channel, got {tuple(x.shape)}")
        half = total * channels
        counts = norm.constant(rows, len(packed), packed)
        merged = torch.batch_norm_gather_stats_with_counts(
            counts, packed[:, :half], packed[:, half:], None, None, 0.0, eps, counts
        )
        means, inverses = (kind.view(total, channels).unbind() for kind in merged)
        norm.saw(_Statistics(norm, means, inverses, rows * len(packed)))
        out = torch.empty_like(x)
        ours = zip(views, out.chunk(local), means[held], inverses[held], strict=True)
        for view, part, mean, inverse in ours:
            torch.batch_norm_elemt(view, weight, bias, mean, inverse, eps, out=part)
        # The kernel of the backward sums what it is given.
        counts = norm.constant(rows * len(packed), 1, packed, torch.int32)
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
        # Sums of g and of g (x - mean), gradients of weight and of bias; each of all views held.
        parts = [
            torch.batch_norm_backward_reduce(*one, weight, True, affine, affine) for one in held
        ]
        kinds = list(zip(*parts, strict=True))
        sums = torch.cat([part for kind in kinds[:2] for part in kind]).view(2, local, channels)
        if ctx.reduce:
            everyones = sums
            if total > local:  # the others hold other views
                everyones = sums.new_zeros(2, total, channels)
                everyones[:, ctx.held] = sums
            _meet("norm", dist.all_reduce, everyones)
            sums = everyones[:, ctx.held] if total > local else sums
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            rows = sums.flatten(0, 1).unbind()
            each = zip(dx.chunk(local), held, rows[:local], rows[local:], strict=True)
            for part, one, first, second in each:
                own_dx = torch.batch_norm_backward_elemt(*one, weight, first, second, counts)
                if local == 1:
                    dx = own_dx
                else:
                    part.copy_(own_dx)
        # DDP averages what each rank contributed to the affine parameters.
        own = [functools.reduce(torch.add, kind) for kind in kinds[2:]] if affine else [None, None]
        return dx, *own, None, None, None


@torch.no_grad()
def _update_averages(seen: dict[GlobalBatchNorm, _Statistics] | None) -> None:
    """Update the running averages of all layers together, in view order; empties `seen`."""
    alike: dict[Any, list[_Statistics]] = {}
    for one in (seen or {}).values():
        if one.norm.running_mean is not None:
            alike.setdefault((one.norm.momentum, len(one.means)), []).append(one)
    if seen:
        seen.clear()
    for (momentum, views), group in alike.items():
        variances = torch._foreach_pow([i for one in group for i in one.inverses], -2)
        scales = [one.number / max(one.number - 1, 1) for one in group for _ in one.inverses]
        torch._foreach_sub_(variances, [one.norm.eps for one in group for _ in one.inverses])
        torch._foreach_mul_(variances, scales)  # unbiased
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


def _has_kernels(x: Tensor) -> bool:
    """Whether torch has the kernels of a synchronised batch norm for this tensor's device."""
    return x.is_cuda


class GlobalBatchNorm(_BatchNorm):
    """Batch normalisation over the global batch, per view or pooled, on CPU and GPU.

    Equals `nn.SyncBatchNorm` called once per view, with one all-reduce for all views. State dict
    and attributes are those of `nn.BatchNorm2d`, so weights move freely between the two. With
    `reduce=False` the statistics are this process's own. On a GPU every process must hold as many
    images as the others.
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
        self._constants: dict[Any, Tensor] = {}
        # timm's fused norm layers carry an activation behind the norm.
        self.after = nn.Sequential(
            *(m for m in (getattr(like, "drop", None), getattr(like, "act", None)) if m is not None)
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [n, C, ...], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        reduce = self.reduce and dist.is_initialized()
        if not self.training:
            out = super().forward(input)
        elif not reduce and (not _has_kernels(input) or torch.compiler.is_compiling()):
            out = self._local(input)
        else:
            out = self._global(input, reduce)
        return cast(Tensor, self.after(out))

    # A collective in the middle breaks the compiled graph either way.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _global(self, input: Tensor, reduce: bool) -> Tensor:
        """The statistics of all processes, each view's its own; running averages in view order."""
        layout = ViewLayout(self.layout.total, self.layout.held)
        if _has_kernels(input):
            affine = (self.weight, self.bias) if self.affine else (None, None)
            return cast(Tensor, _NormalizeOnGPU.apply(input, *affine, self, layout, reduce))
        weight = self.weight if self.affine else input.new_ones(self.num_features)
        bias = self.bias if self.affine else input.new_zeros(self.num_features)
        out, means, variances = cast(
            tuple[Tensor, Tensor, Tensor],
            _NormalizeOnCPU.apply(input, weight, bias, self.eps, layout),
        )
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                for mean, variance in zip(means, variances, strict=True):
                    self.num_batches_tracked.add_(1)
                    momentum = self.momentum
                    if momentum is None:  # a cumulative average
                        momentum = 1.0 / float(self.num_batches_tracked)
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                    self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)
        return out

    def saw(self, one: _Statistics) -> None:
        """Update the running averages: with those of other layers at the end of `stacked_views`.

        A layer that is used twice within comes first the first time.
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
        """`count` times `value`, made once: a tensor made in every step costs the host time."""
        key = (value, count, dtype or like.dtype, like.device)
        if key not in self._constants:
            with torch.inference_mode(False):
                self._constants[key] = torch.full((count,), value, dtype=key[2], device=key[3])
        return self._constants[key]

    def _local(self, input: Tensor) -> Tensor:
        """This process's own statistics, torch's kernels: one call per view held here."""
        views = input.chunk(self.layout.local)
        out = [super(GlobalBatchNorm, self).forward(view) for view in views]
        return torch.cat(out) if len(out) > 1 else out[0]


def global_batch_norm(module: nn.Module, layout: ViewLayout, reduce: bool = True) -> nn.Module:
    """`module` with every batch norm replaced by `GlobalBatchNorm`, weights kept."""
    if isinstance(module, _BatchNorm):
        return GlobalBatchNorm(module, layout, reduce)
    for name, child in list(module.named_children()):
        setattr(module, name, global_batch_norm(child, layout, reduce))
    return module


def comm_of(world: World, view_shards: int = 1) -> Comm:
    """The `Comm` of this world: the identity for one process."""
    return MeshComm(world, view_shards) if world.size > 1 else ONE_PROCESS
