"""A process that died or hangs is noticed, named, and ends the run everywhere.

Each process leaves a note of how far it is, every second, from a thread of its own: a number that
grows, its last step, how many collectives it entered, what it does. Whoever gets no further, or
finds the others gone, reads all notes and says whose fault it is:

* a note that ends in an error: that process failed, and this is why;
* a note that grows no more: that process, or its machine, died or was stopped;
* the fewest collectives: that process never came to where the others wait.

A step may take `run.timeout_s`; what else the loop does, `run.start_timeout_s`.
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
from ddp_ssl.distributed import Whiteboard, World, traffic

logger = logging.getLogger("ddp_ssl")

PERIOD_S = 1.0
SILENT = 4  # periods without a sign of life that a busy machine may explain


@dataclass
class Note:
    """What a process says of itself."""

    host: str
    beat: int = 0
    step: int = 0
    collectives: int = 0
    doing: str = "starting"
    error: str | None = None


class Watchdog:
    """Watches this process's progress, and on two ranks the others' signs of life."""

    def __init__(self, world: World, limits: Run) -> None:
        self.world = world
        self.period = min(PERIOD_S, limits.timeout_s / 10)
        self.long, self.short = max(limits.start_timeout_s, limits.timeout_s), limits.timeout_s
        self.on_end: Callable[[str], None] = lambda reason: None
        """Called with the reason, on the one process that speaks, before the run ends."""
        self._note = Note(socket.gethostname())
        self._limit, self._since = self.long, time.monotonic()
        self._first_step: int | None = None
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its last beat, and when it changed
        self._closed = threading.Event()
        self._writing = threading.Lock()
        self._board: Whiteboard | None = world.whiteboard(max(5.0, 5 * self.period))
        if self._board is not None:
            self._write()
            world.barrier()  # everyone's first note is there
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    # --- the main thread says what it does -----------------------------------------------------

    def at(self, step: int, doing: str) -> None:
        """Progress: `step` steps are done, and this is next.

        It may take `run.timeout_s`; the first step of the process, `run.start_timeout_s`.
        """
        self._first_step = step if self._first_step is None else self._first_step
        self._note.step, self._note.doing = step, doing
        self._limit = self.short if step > self._first_step else self.long
        self._since = time.monotonic()

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Within: something that may take `run.start_timeout_s`."""
        before = self._note.doing, self._limit
        self._note.doing, self._limit, self._since = doing, self.long, time.monotonic()
        try:
            yield
        finally:
            self._note.doing, self._limit = before
            self._since = time.monotonic()

    def failed(self, error: str) -> None:
        """Tell the others why this process leaves."""
        self._note.error = error
        self._write()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    # --- who it was ----------------------------------------------------------------------------

    def explain(self) -> tuple[str, bool]:
        """Why the others are not there, and whether it is this process that should say so.

        Takes a few periods, in which the notes of the living must grow. Empty if all are there and
        equally far.
        """
        deadline = time.monotonic() + SILENT * self.period
        notes: list[Note] = []
        first: list[Note] = []
        while not notes or time.monotonic() < deadline:
            try:
                notes = self._read()
            except RuntimeError:
                return (
                    "the process that holds the rendezvous cannot be reached (rank 0, or torchrun "
                    f"on the first node): it, its node or the network died; this is rank "
                    f"{self.world.rank} after step {self._note.step}",
                    True,
                )
            first = first or notes
            if any(note.error for note in notes):
                break
            time.sleep(self.period / 2)
        culprits, reason = blame(first, notes)
        if not culprits:
            return "", self.world.is_main
        speaker = min(set(range(self.world.size)) - set(culprits), default=self.world.rank)
        return reason, self.world.rank == speaker

    # --- the thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.wait(self.period):
            self._note.beat += 1
            self._write()
            stuck = time.monotonic() - self._since
            if stuck > self._limit:
                reason, speaks = self.explain()
                reason = reason or f"all processes wait in: {self._note.doing}"
                self._end(f"no progress for {stuck:.0f} s: {reason}", speaks)
            elif self.world.rank < 2 and (silent := self._silent()):
                reason, speaks = self.explain()
                if reason:
                    self._end(f"{reason} (noticed after {silent:.0f} s)", speaks)

    def _silent(self) -> float:
        """For how long the most silent process has given no sign of life, if that is too long."""
        try:
            notes = self._read()
        except RuntimeError:
            return 0.0  # whoever held the notes is gone; what this process does will fail too
        now, longest = time.monotonic(), 0.0
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

    def _write(self) -> None:
        self._note.collectives = traffic.calls
        with self._writing:
            if self._board is not None:
                try:
                    self._board.write(self.world.rank, json.dumps(vars(self._note)))
                except RuntimeError:
                    self._board = None

    def _read(self) -> list[Note]:
        board = self._board
        if board is None:
            raise RuntimeError("the notes cannot be reached")
        return [Note(**json.loads(text)) for text in board.read()]


def blame(before: list[Note], now: list[Note]) -> tuple[list[int], str]:
    """The ranks that hold up the others, and what to say; `before` is some periods older.

    Nobody, if all notes grow and all are equally far.
    """
    failed = [rank for rank, note in enumerate(now) if note.error]
    silent = [
        r for r, (old, new) in enumerate(zip(before, now, strict=True)) if old.beat == new.beat
    ]
    fewest = min(note.collectives for note in now)
    behind = [rank for rank, note in enumerate(now) if note.collectives == fewest]
    if failed:
        note = now[failed[0]]
        return failed, f"{_who(failed, now)} failed after step {note.step}: {note.error}"
    if silent:
        return silent, (
            f"{_who(silent, now)} died or was stopped; last heard of after step "
            f"{now[silent[0]].step}"
        )
    if len(behind) < len(now):
        note = now[behind[0]]
        return behind, f"{_who(behind, now)} hangs after step {note.step}, in: {note.doing}"
    return [], ""


def _who(ranks: list[int], notes: list[Note]) -> str:
    named = f"rank {ranks[0]} ({notes[ranks[0]].host})"
    return named if len(ranks) == 1 else f"{named} and {len(ranks) - 1} more"
