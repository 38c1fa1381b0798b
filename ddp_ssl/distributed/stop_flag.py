"""A flag that all processes see raised at the same step."""

from typing import Any

import torch
import torch.distributed as dist

from ddp_ssl.distributed.primitives import comm_stats
from ddp_ssl.distributed.world import World


class StopFlag:
    """A flag that any process may raise. All processes see it raised at the same step.

    The all-reduce runs in the background, on the hosts, and is read one step late, so that no step
    waits for it.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.raised = False
        self._tensor = torch.zeros(1)
        self._work: Any = None

    def exchange(self, flag: bool) -> bool:
        """Send this step's flag; return whether any process had raised its flag one step ago."""
        if self.world.size == 1:
            self.raised = self.raised or flag
            return self.raised
        if self._work is not None:
            self._work.wait()
            self.raised = self.raised or bool(self._tensor.item())
        self._tensor = torch.full((1,), float(flag))
        comm_stats.count("flag", self._tensor.nbytes)
        self._work = dist.all_reduce(
            self._tensor, dist.ReduceOp.MAX, group=self.world.side, async_op=True
        )
        return self.raised

    def now(self, flag: bool) -> bool:
        """Send this step's flag and wait for the others'. Synchronises with the device."""
        before = self.wait()
        self.raised = self.world.any(flag or before)
        return self.raised

    def wait(self) -> bool:
        """Wait for the flag in flight; the answer is the same on every process."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self.raised = self.raised or bool(self._tensor.item())
        return self.raised
