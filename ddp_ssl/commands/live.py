"""How several runs stand while they go on: a line for each, and a table of them in a file."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from ddp_ssl.commands.runs import best_of, overviews, state_of, table
from ddp_ssl.run.overview import Overview
from ddp_ssl.utils.files import replace_text
from ddp_ssl.utils.streams import say
from ddp_ssl.utils.text import one_line

TABLE = "table.md"
EVERY_S = 10.0  # between two printed lines of a run whose state stays the same
UP, CLEAR = "\x1b[{}A\r", "\r\x1b[J"


class Live:
    """A line for each run: its state, epoch, step and best figure.

    In a terminal the lines are rewritten in place. Elsewhere, and without `in_place`, a run's line
    is printed when its state changes, and at most every ten seconds when its epoch or step does.
    """

    def __init__(self, folders: Sequence[Path], in_place: bool = True) -> None:
        self.folders = folders
        self.found: list[Overview] = overviews(folders)
        """The runs as they were last looked at."""
        self._over: set[int] = set()
        self._settled: set[int] = set()
        self._in_place = in_place and sys.stdout.isatty()
        self._above = "" if in_place or not sys.stdout.isatty() else CLEAR  # a run's own progress
        self._drawn: list[str] = []
        self._said: dict[int, tuple[str, int, float]] = {}
        self._looked = 0.0

    def update(self, over: Collection[int] = (), every_s: float = 0.0) -> None:
        """Look at the runs again, unless that was less than `every_s` seconds ago.

        `over`: numbers of the runs whose processes have ended.
        """
        if time.monotonic() - self._looked < every_s:
            return
        look = [index for index in range(len(self.folders)) if index not in self._settled]
        try:
            fresh = overviews([self.folders[index] for index in look])
        except OSError:  # a file system that does not answer for a while
            return
        for index, found in zip(look, fresh, strict=True):
            if index in over and found.state in ("training", "stale"):
                found = dataclasses.replace(found, state="dead")  # as the cluster knows
            self.found[index] = found
        # On a shared file system the last state of a run may be seen some time after its end.
        unsure = ("dead", "not started")
        self._over.update(over)
        self._settled.update(i for i in over if self.found[i].state not in unsure)
        self._looked = time.monotonic()
        if self._in_place:
            self._draw(self._block())
        else:
            self._print()

    def clear(self) -> None:
        """Take the lines away, for something else to be printed; the next update brings them."""
        sys.stdout.write(self._erase())
        sys.stdout.flush()
        self._drawn = []

    def _erase(self) -> str:
        return UP.format(len(self._drawn)) + CLEAR if self._drawn else self._above

    def state(self, index: int) -> str:
        """`waiting` before the first start; else the state of the overview."""
        waits = self.found[index].state == "not started" and index not in self._over
        return "waiting" if waits else state_of(self.found[index])

    def _line(self, index: int, longest: int = 80) -> str:
        found = self.found[index]
        width = min(max(len(folder.name) for folder in self.folders), longest)
        parts = [f"{self.folders[index].name[:width]:<{width}}", f"{self.state(index):<11}"]
        if found.epoch is not None:
            parts.append(f"epoch {found.epoch}/{found.epochs or '?'}")
            parts.append(f"step {found.step}")
        if found.best is not None:
            parts.append(f"{found.metric} {best_of(found)}")
        if found.error and found.state in ("failed", "dead"):
            parts.append(one_line(found.error))
        return "  ".join(parts).rstrip()

    def _print(self) -> None:
        now = time.monotonic()
        for index, found in enumerate(self.found):
            state, step, when = self._said.get(index, ("waiting", 0, 0.0))
            changed = self.state(index) != state
            if changed or (found.step != step and now - when >= EVERY_S):
                self._said[index] = (self.state(index), found.step, now)
                say(self._above + self._line(index))

    def _block(self) -> list[str]:
        """The lines that fit in the terminal: those of runs under way first, then of ended ones."""
        columns, rows = shutil.get_terminal_size()
        shown, room = list(range(len(self.folders))), max(rows - 2, 1)
        if len(shown) > room:
            waiting = [self.state(index) == "waiting" for index in shown]
            shown.sort(key=lambda index: (index in self._over) + 2 * waiting[index])
            shown = sorted(shown[:room])
        lines = [self._line(index, columns // 2)[: columns - 1] for index in shown]
        more = len(self.folders) - len(shown)
        return [*lines, f"and {more} more"] if more else lines

    def _draw(self, lines: list[str]) -> None:
        if lines != self._drawn:
            say(self._erase() + "\n".join(lines))
            self._drawn = lines


def write_table(folders: Sequence[Path]) -> None:
    """Write the table of a sweep's runs into its folder; may raise `OSError`.

    Runs may end at the same time, each writing it. Each looks again afterwards, so that the last
    one to write has seen the end of all.
    """
    written: Sequence[str] = ()
    while True:
        found = overviews(folders)
        states = [each.state for each in found]
        if states == written:
            return
        replace_text(folders[0].parent / TABLE, "\n".join(table(found)) + "\n")
        written = states
