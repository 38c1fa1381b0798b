"""A process that died or hangs is noticed and named, and the run ends everywhere.

Each process writes a heartbeat every second, from a thread of its own: a number that grows, its
last step, how many collectives it entered, its current work. A process that makes no progress for
`run.timeout_s`, or loses its peers, reads all heartbeats and names the rank at fault:

* a heartbeat with an error: that process failed, and this is why;
* a heartbeat that grows no more: that process, or its machine, died or was stopped;
* the fewest collectives: that process never came to where the others wait.

A step may take `run.timeout_s`; everything else that the loop does, `run.start_timeout_s`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ddp_ssl.config import Run
from ddp_ssl.distributed import HeartbeatStore, World, comm_stats

logger = logging.getLogger("ddp_ssl")

PERIOD_S = 1.0
IN_A_STEP = ("waiting for data", "a step")  # what the loop says it does
SLOW_S = 60.0  # seconds of a step after which a line says so
SILENT = 4  # periods without a sign of life that a busy machine may explain


@dataclass
class Heartbeat:
    """The state of a process, written by itself."""

    host: str
    beat: int = 0
    step: int = 0
    collectives: int = 0
    doing: str = "starting"
    error: str | None = None


class Watchdog:
    """Watches this process's progress, and on ranks 0 and 1 the heartbeats of the others."""

    def __init__(self, world: World, limits: Run) -> None:
        self.world = world
        self.period = min(PERIOD_S, limits.timeout_s / 10)
        self.long, self.short = max(limits.start_timeout_s, limits.timeout_s), limits.timeout_s
        self.on_end: Callable[[str], None] = lambda reason: None
        """Called with the reason, on the one process that speaks, before the run ends."""
        self._heartbeat = Heartbeat(socket.gethostname())
        self._limit, self._since = self.long, time.monotonic()
        self._first_step: int | None = None
        self._slow: float | None = None  # the beginning of the slow step that was told
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its last beat, and when it changed
        self._mute_since: float | None = None  # since when the heartbeats cannot be read
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._board: HeartbeatStore | None = world.heartbeats(max(5.0, 5 * self.period))
        if self._board is not None:
            self._beat()
            world.barrier()  # the first heartbeat of every rank is there
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    # --- called by the main thread -----------------------------------------------------

    def at(self, step: int, doing: str) -> None:
        """Progress: `step` steps are done, and this is next.

        It may take `run.timeout_s`; the first step of the process, `run.start_timeout_s`.
        """
        self._first_step = step if self._first_step is None else self._first_step
        self._heartbeat.step, self._heartbeat.doing = step, doing
        self._since = time.monotonic()  # before the limit: the thread may look in between
        self._limit = self.short if step > self._first_step else self.long

    def next(self, doing: str) -> None:
        """Progress while the run is built: this is next, and may take `run.start_timeout_s`."""
        self._heartbeat.doing, self._since = doing, time.monotonic()

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Within: something that may take `run.start_timeout_s`."""
        before = self._heartbeat.doing, self._limit
        self._heartbeat.doing, self._limit, self._since = doing, self.long, time.monotonic()
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._heartbeat.doing, self._limit = before

    def failed(self, error: str) -> None:
        """Tell the others why this process leaves."""
        self._heartbeat.error = error
        self._beat()
        if self._board is not None and self.world.is_main and not self._board.outlives_rank_0:
            time.sleep(2 * SILENT * self.period)  # the others must be able to read it

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    # --- naming the rank at fault ----------------------------------------------------------------

    def explain(self) -> tuple[str, bool]:
        """Why the other processes are missing, and whether this process reports it.

        Takes a few periods, in which the heartbeats of living processes grow. Empty if all are
        there and equally far, or if this process itself is behind.
        """
        try:
            before = self._read()
            deadline = time.monotonic() + SILENT * self.period
            while time.monotonic() < deadline and not any(note.error for note in before):
                time.sleep(self.period)
                self._beat()  # the thread that does it otherwise may be the one that waits here
            now = self._read()
        except RuntimeError:
            step = self._heartbeat.step
            return (
                "the process that holds the rendezvous cannot be reached (rank 0, or torchrun on "
                f"the first node): it, its node or the network died; this is rank "
                f"{self.world.rank} after step {step}",
                self.world.rank <= 1,
            )
        culprits, reason = blame(before, now, self.world.rank)
        if self.world.rank in culprits:
            return "", True
        speaker = min(set(range(self.world.size)) - set(culprits), default=self.world.rank)
        return reason, self.world.rank == speaker

    # --- the thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self.period):
            now = time.monotonic()
            if now - last > 5 * self.period:  # stopped for a while, by a scheduler or a debugger
                self._since += now - last
                self._seen.clear()
            last = now
            self._tell_if_slow(now)
            if self._board is None:  # one process, which waits for nobody
                continue
            self._beat()
            if self._stuck():
                self._end_stuck()
            elif self.world.rank < 2 and self._silent():
                self._end_silent()
            last = time.monotonic()

    def _tell_if_slow(self, now: float) -> None:
        """Say once, on rank 0, that the step under way takes long."""
        since, note = self._since, self._heartbeat
        slow = note.doing in IN_A_STEP and now - since > SLOW_S
        if slow and self.world.is_main and self._slow != since:
            self._slow = since
            logger.info(
                "step %d has taken %.0f s so far, in: %s", note.step + 1, now - since, note.doing
            )

    def _stuck(self) -> float:
        """For how long there was no progress here, if that is too long; else 0."""
        seconds = time.monotonic() - self._since
        return seconds if seconds > self._limit else 0.0

    def _end_stuck(self) -> None:
        reason, speaks = self.explain()
        if not reason:
            time.sleep(2 * SILENT * self.period)  # if this process is at fault, the others name it
        if seconds := self._stuck():  # still, after the time that it took to explain
            reason = reason or f"all processes wait, or this one hangs, in: {self._heartbeat.doing}"
            self._end(f"no progress for {seconds:.0f} s: {reason}", speaks)

    def _end_silent(self) -> None:
        reason, speaks = self.explain()
        seconds = self._silent()
        if reason and seconds:
            self._end(f"{reason} (noticed after {seconds:.0f} s)", speaks)

    def _silent(self) -> float:
        """For how long the most silent process has given no sign of life, if that is too long."""
        now, longest = time.monotonic(), 0.0
        try:
            notes = self._read()
        except RuntimeError:
            # No process can write either, so silence does not count, except that of rank 0 where it
            # holds the heartbeats: the others may be waiting for it in a long task.
            self._seen.clear()
            assert self._board is not None
            if self._board.outlives_rank_0 or self.world.is_main:
                return 0.0
            self._mute_since = self._mute_since or now
            return now - self._mute_since if now - self._mute_since > self.short else 0.0
        self._mute_since = None
        for rank, note in enumerate(notes):
            beat, since = self._seen.get(rank, (-1, now))
            if note.beat != beat:
                self._seen[rank] = note.beat, now
            elif now - since > self.short:
                longest = max(longest, now - since)
        return longest

    def _end(self, reason: str, speaks: bool) -> None:
        """The main thread cannot be woken: end the process as it is."""
        if self._closed.is_set():
            return
        if speaks:
            logger.error("%s", reason)
            with contextlib.suppress(Exception):
                self.on_end(reason)
        else:
            time.sleep(2 * self.period)  # the launcher ends all at the first exit
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)

    def _beat(self) -> None:
        """A sign of life, if it can be given."""
        with self._lock:
            self._heartbeat.beat += 1
            self._heartbeat.collectives = comm_stats.calls
            text = json.dumps(vars(self._heartbeat))
        if self._board is not None:
            with contextlib.suppress(RuntimeError):
                self._board.write(self.world.rank, text)

    def _read(self) -> list[Heartbeat]:
        assert self._board is not None
        return [Heartbeat(**json.loads(text)) for text in self._board.read()]


def blame(before: list[Heartbeat], now: list[Heartbeat], me: int) -> tuple[list[int], str]:
    """The ranks that hold up the others, and why; `before` is some periods older than `now`.

    No rank, if all heartbeats grow and all are equally far. Rank `me`, which asks, is alive.
    """
    failed = [rank for rank, note in enumerate(now) if note.error]
    silent = [
        rank
        for rank, (old, new) in enumerate(zip(before, now, strict=True))
        if old.beat == new.beat and rank != me
    ]
    fewest = min(note.collectives for note in now)
    behind = [rank for rank, note in enumerate(now) if note.collectives == fewest]
    if failed:
        note = now[failed[0]]
        return failed, f"{_name(failed, now)} failed after step {note.step}: {note.error}"
    if silent:
        return silent, (
            f"{_name(silent, now)} died or was stopped; last heard of after step "
            f"{now[silent[0]].step}"
        )
    if len(behind) < len(now):
        note = now[behind[0]]
        return behind, f"{_name(behind, now)} hangs after step {note.step}, in: {note.doing}"
    return [], ""


def _name(ranks: list[int], notes: list[Heartbeat]) -> str:
    named = f"rank {ranks[0]} ({notes[ranks[0]].host})"
    return named if len(ranks) == 1 else f"{named} and {len(ranks) - 1} more"
