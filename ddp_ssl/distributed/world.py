"""The process group: how a process joins and leaves it, and talks to the others from the host."""

import contextlib
import datetime
import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ddp_ssl.distributed.heartbeat import HeartbeatStore
from ddp_ssl.distributed.primitives import all_gather_single, comm_stats, run_collective
from ddp_ssl.driver import why_no_gpu
from ddp_ssl.errors import ConfigError
from ddp_ssl.utils.launcher import local_rank_and_size, ranges, rank_and_size, restarts


@dataclass(frozen=True)
class World:
    """This process's rank, device and host-side process group."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    side: Any = None  # a gloo group for flags and barriers, so that neither blocks the device
    timeout: datetime.timedelta | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes all files."""
        return self.rank == 0

    def gather_objects(self, value: Any) -> list[Any] | None:
        """Every process's picklable value on rank 0, in rank order; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        run_collective("host", dist.gather_object, value, values, dst=0, group=self.side)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable value on every process."""
        if self.size == 1:
            return value
        box = [value]
        run_collective("host", dist.broadcast_object_list, box, src=0, group=self.side)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised on any process. Synchronises with the device.

        The reduction runs on the device, because gloo's goes around a ring of all hosts twice.
        """
        if self.size == 1:
            return flag
        raised = torch.tensor([float(flag)], device=self.device)
        run_collective("flag", dist.all_reduce, raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def barrier(self) -> None:
        """Wait for every process, on the host."""
        if self.size > 1:
            run_collective("host", dist.barrier, group=self.side)

    def mean_rows(self, rows: Tensor) -> Tensor:
        """Mean over processes of a tensor on the device."""
        if self.size > 1:
            run_collective("log", dist.all_reduce, rows)
            rows = rows / self.size
        return rows

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every process's numbers on every process, in rank order; on the host."""
        mine = torch.tensor([numbers], dtype=torch.float64)
        if self.size == 1:
            return cast(list[list[float]], mine.tolist())
        gathered = mine.new_empty(self.size, len(numbers))
        run_collective("host", all_gather_single, gathered, mine, group=self.side)
        return cast(list[list[float]], gathered.tolist())

    def heartbeats(self, timeout_s: float) -> HeartbeatStore | None:
        """The store of all processes' heartbeats; None for one process."""
        if self.size == 1:
            return None
        token = self.broadcast_object(os.urandom(8).hex())  # keeps an earlier start's apart
        return HeartbeatStore(token, self.size, timeout_s)


class Disagreement(ConfigError):
    """All processes found together that they cannot form a group."""

    together = True


def start(device: str = "auto", timeout_s: float = 1800, checked: bool = False) -> World:
    """Join the process group that the launcher describes; one process needs none.

    Reads torchrun's variables, or Slurm's when `srun` starts one task per GPU. `device` is `auto`,
    `cuda` or `cpu`; `auto` is the CPU only where no GPU is meant (`driver.py`). `checked`: one
    process forms a group too, and the processes compare every collective of the default group
    before it runs; if they differ, all of them raise `RuntimeError`. Raises `ValueError`
    (with several ranks `Disagreement`, on all of them) if a rank lacks the GPU that is asked for or
    meant for it, if some ranks have a GPU and others none, or if two ranks share one.
    """
    comm_stats.calls = 0
    comm_stats.counts.clear()
    rank, size = rank_and_size()
    local_rank, local_size = local_rank_and_size()
    place, missing = _find_device(device, local_rank)
    if size == 1:
        if missing:
            raise ValueError(f"run.device: {missing}")
        if not checked:
            return World(0, 1, 0, 1, place)
    timeout = datetime.timedelta(seconds=timeout_s)
    side = _join(rank, size, place, timeout, checked)
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


def _find_device(device: str, local_rank: int) -> tuple[torch.device, str | None]:
    """The device of this process, and the reason if it lacks the GPU that is meant for it."""
    with warnings.catch_warnings():
        # `why_no_gpu` says more than torch's warning about an old driver.
        warnings.simplefilter("ignore")
        use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        # Under --gpus-per-task each task sees one GPU, so the local rank can exceed the count.
        place = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
        return place, None
    missing = None if device == "cpu" else why_no_gpu(torch.__version__, torch.version.cuda)
    if device == "cuda":
        missing = f"cuda is not available here; {missing or 'auto or cpu would be accepted'}"
    return torch.device("cpu"), missing


def _join(
    rank: int, size: int, place: torch.device, timeout: datetime.timedelta, checked: bool
) -> Any:
    """Make the default process group; returns the group for the hosts."""
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            "MASTER_ADDR, MASTER_PORT: not set, so the processes cannot find each other; start "
            "with torchrun, or export both"
        )
    # NCCL connects at the first collective on a GPU. The devices are compared before that.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    # torchrun may keep one store over its restarts, with the addresses of dead processes in it, so
    # each restart gets a prefix. On several nodes each agent counts restarts for itself, so the
    # count is of no use there.
    # A user who names another interface for gloo wants the addresses that the launcher gave.
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    alone = local_rank_and_size()[1] == size and chosen == "lo" and _has_loopback()
    store = _store(rank, size, timeout, alone)
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = PrefixStore(f"start {restarts()}", store)
    if alone:  # for the groups to come too
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    debug = cast(Any, dist)  # these names are not among those that torch exports to mypy
    level = debug.get_debug_level()
    if checked:
        debug.set_debug_level(debug.DebugLevel.DETAIL)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    finally:
        debug.set_debug_level(level)
    return dist.new_group(backend="gloo", timeout=timeout)


def _has_loopback() -> bool:
    """Whether there is an interface `lo` with IPv4; a container may lack it."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "lo" in (name for _, name in socket.if_nameindex())
    return False


def _store(rank: int, size: int, timeout: datetime.timedelta, alone: bool) -> Any:
    """The store that the processes meet in; `alone`: all are on this machine.

    It can then be reached from this machine only, unless torchrun's agent has opened it already.
    """
    if alone and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        host, port = "127.0.0.1", int(os.environ["MASTER_PORT"])
        os.environ["MASTER_ADDR"] = host
        try:
            listening = socket.create_server((host, port)).detach() if rank == 0 else None
        except OSError as error:
            raise ValueError(
                f"MASTER_PORT: {port} cannot be listened on: {error.strerror}; a free port is "
                "accepted"
            ) from None
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, size, rank == 0, timeout, master_listen_fd=listening
        )
    return next(rendezvous("env://", rank, size, timeout=timeout))[0]


def open_store() -> tuple[Any, int]:
    """A store on loopback for processes of this machine, and its port; it ends with the object.

    They find it as torchrun's: with `TORCHELASTIC_USE_AGENT_STORE=True`, its port in `MASTER_PORT`,
    and another `TORCHELASTIC_RESTART_COUNT` for each group.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    return store, port


def meet(port: int, name: str, size: int, ready: bool, timeout_s: float) -> bool:
    """Wait until `size` processes have called this with `name`; whether all of them are `ready`.

    `port` is that of `open_store`. Raises `RuntimeError` after `timeout_s`.
    """
    limit = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, timeout=limit)  # type: ignore[attr-defined]
    if not ready:
        store.add(f"{name} not ready", 1)
    if store.add(f"{name} here", 1) == size:
        store.set(f"{name} all", "")
    store.wait([f"{name} all"], limit)
    return bool(store.add(f"{name} not ready", 0) == 0)


def _place(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    # The UUID, because under srun --gpus-per-task every task sees its own GPU as number 0.
    return f"cuda {socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _conflict(places: list[str]) -> str | None:
    """The reason why processes on these devices cannot form a group, or None."""
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


def with_timeout(world: World, timeout_s: float) -> World:
    """The same processes with another timeout of host-side collectives."""
    if world.size == 1:
        return world
    limit = datetime.timedelta(seconds=timeout_s)
    return replace(world, side=dist.new_group(backend="gloo", timeout=limit), timeout=limit)


def wait_for_all(world: World, timeout_s: float) -> None:
    """A barrier on the host. On rank 0 a `RuntimeError` names the ranks that came too late.

    `timeout_s` may be at most the world's own timeout.
    """
    if world.size > 1:
        limit = datetime.timedelta(seconds=timeout_s)
        dist.monitored_barrier(world.side, limit, wait_all_ranks=True)
