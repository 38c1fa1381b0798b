"""Collectives under one name in every torch, with their calls, bytes and waiting time counted."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddp_ssl.utils import device_timer

# torch 2.13 renamed the single-tensor collectives and deprecated the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CommStats:
    """Calls and bytes of this process's collectives, and, while `sampling`, the time in them.

    The slowest process waits least, since the others wait for it.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.counts: dict[str, tuple[int, int]] = {}
        self.sampling = False
        self._spans: list[tuple[Any, Any]] = []
        self._ready: Any = None
        self._device = torch.device("cpu")

    def count(self, kind: str, nbytes: int, calls: int = 1) -> None:
        """Add calls and bytes to `counts[kind]`. Integers on the host; the device is not asked.

        The bytes are those of the whole tensors, whatever part of them the backend sends. The kinds
        are `norm`, `sum`, `view sum`, `gather`, `scatter` (a gather's adjoint), `gradients` (bytes
        alone, since DDP makes the calls), `flag`, `log` and `host` (objects count as zero bytes).
        """
        before = self.counts.get(kind, (0, 0))
        self.counts[kind] = before[0] + calls, before[1] + nbytes

    def sample(self, device: torch.device) -> None:
        """Measure waiting time from now until `waited` is called."""
        self.sampling, self._device = True, device
        self._spans, self._ready = [], None

    def mark(self) -> Any:
        """The present time on the device's own clock."""
        return device_timer.now(self._device)

    def span(self, start: Any) -> None:
        """Count the time since `start` as waiting."""
        self._spans.append((start, self.mark()))

    def gradient_ready(self, parameter: Tensor, itemsize: int | None = None) -> None:
        """Note that this process's part of a gradient is computed; the last call sets the time."""
        self.count("gradients", parameter.numel() * (itemsize or parameter.itemsize), calls=0)
        if self.sampling:
            self._ready = self.mark()

    def gradients_reduced(self) -> None:
        """Count as waiting the time from the last gradient to the end of backward."""
        if self.sampling and self._ready is not None:
            self.span(self._ready)

    def waited(self) -> float:
        """End sampling; return the seconds spent waiting. Synchronises with the device."""
        self.sampling = False
        spans, self._spans = self._spans, []
        return sum(device_timer.seconds_between(start, end) for start, end in spans)


comm_stats = CommStats()


def run_collective(kind: str, operation: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Run a blocking collective; count its bytes and, while sampling, its time."""
    comm_stats.calls += 1
    comm_stats.count(kind, max((a.nbytes for a in args if isinstance(a, Tensor)), default=0))
    if not comm_stats.sampling:
        operation(*args, **options)
        return
    start = comm_stats.mark()
    operation(*args, **options)
    comm_stats.span(start)


def others_failed(error: BaseException) -> bool:
    """Whether this error is the sign of another process that died or left."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection", "timed out", "socket", "store")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )
