"""How long the processes wait for each other, at logging steps."""

from __future__ import annotations

import logging
import time

from ddp_ssl.distributed import World, comm_stats

logger = logging.getLogger("ddp_ssl")

SLOW = 0.2  # share of a step that the others wait for the slowest process
SLOW_TIMES = 3  # samples in a row before it is named


class RankSkew:
    """Samples of the waiting times of all processes; names a process that is always the slowest.

    `hosts` are the names of all ranks' machines, on rank 0.
    """

    def __init__(self, world: World, hosts: list[str]) -> None:
        self._world, self._hosts = world, hosts
        self._began = 0.0
        self._slow: list[int] = []  # the slowest rank of each sample, while it is slow
        self._named: set[int] = set()

    def begin(self) -> None:
        """Before a step: measure from here on."""
        if self._world.size > 1:
            self._began = time.perf_counter()
            comm_stats.sample(self._world.device)

    def measure(self) -> dict[str, float]:
        """After the step, on all processes: the metrics of the sample; none without a sample."""
        if not comm_stats.sampling:
            return {}
        waited = comm_stats.waited()
        took = time.perf_counter() - self._began
        waits, steps = zip(*self._world.gather_numbers([waited, took]), strict=True)
        skew = (max(waits) - min(waits)) / max(steps)
        slowest = waits.index(min(waits))  # the slowest process waits least
        self._slow = [*self._slow, slowest][-SLOW_TIMES:] if skew > SLOW else []
        if self._slow == [slowest] * SLOW_TIMES and slowest not in self._named:
            self._named.add(slowest)
            if self._world.is_main:
                logger.warning(
                    "rank %d (%s) is slow: the others wait %.0f %% of a step for it",
                    slowest, self._hosts[slowest], 100 * skew,
                )  # fmt: skip
        return {"perf/rank_skew": skew, "perf/communication_ms": 1000 * min(waits)}
