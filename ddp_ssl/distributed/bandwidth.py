"""The speed of the connections between processes, for `ddp-ssl doctor`."""

import contextlib
import datetime
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddp_ssl.distributed.world import World
from ddp_ssl.utils import device_timer


@dataclass(frozen=True)
class Exchange:
    """The measured speed of an all-reduce, as this process saw it."""

    backend: str
    nbytes: int
    seconds: float  # seconds of one all-reduce of `nbytes`: the best of three
    latency: float  # seconds of one all-reduce of four bytes: the median
    correct: bool  # whether every sum was right
    link: float
    """Seconds to receive `nbytes` from the rank before while all ranks send: the best of three."""


def measure_bandwidth(
    world: World, device: torch.device, nbytes: int, timeout_s: float
) -> Exchange:
    """Measure an all-reduce between all processes: NCCL on GPUs, gloo on CPUs.

    A collective: all processes call it, each with a GPU of its own or none. It uses a group of its
    own, so that a failure leaves the other groups usable. Raises `RuntimeError` after `timeout_s`.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=timeout_s)
    group: Any = dist.new_group(backend=backend, timeout=limit)
    try:
        total, count = world.size * (world.size + 1) / 2, nbytes // 4
        correct = True

        def settle() -> None:
            if device.type == "cuda":
                wait_for_gpu(device, timeout_s)

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
    except Exception:
        if device.type == "cuda":  # to destroy the group would wait for what never ends
            with contextlib.suppress(Exception):
                dist.distributed_c10d._abort_process_group(group)
        raise
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group(group)


def wait_for_gpu(device: torch.device, timeout_s: float) -> None:
    """Wait until a GPU has done all that was launched; `RuntimeError` after `timeout_s`.

    A collective that never ends would hold `torch.cuda.synchronize` for ever.
    """
    end, limit = device_timer.now(device), time.perf_counter() + timeout_s
    while not end.query():
        time.sleep(0)  # lets other threads run
        if time.perf_counter() > limit:
            raise RuntimeError(f"the GPUs have not finished talking after {timeout_s:g} s")
