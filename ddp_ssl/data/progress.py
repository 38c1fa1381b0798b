"""How far a tool is, for whoever waits for it."""

from __future__ import annotations

import sys
import threading
import time

EVERY = 5.0  # seconds between lines


def tell(line: str) -> None:
    """A line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """A line on stderr every few seconds; for any number of threads. `what` begins the line."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.count, self.kept = what, total, 0, 0
        self.start = self.said = time.monotonic()
        self.lock = threading.Lock()

    def add(self, count: int = 1, also: str = "") -> None:
        """So many more are done; `also` is said with the next line."""
        with self.lock:
            self.count += count
            if time.monotonic() - self.said > EVERY:
                self.said = time.monotonic()
                self.say(also)

    def keep(self, count: int) -> None:
        """These need no work."""
        with self.lock:
            self.kept += count

    def say(self, also: str = "") -> None:
        """How far it is, how fast, and how long it will take."""
        rate = self.count / max(time.monotonic() - self.start, 1e-3)
        left = self.total - self.kept - self.count
        eta = time.strftime("%H:%M:%S", time.gmtime(left / rate)) if rate else "?"
        tell(
            f"{self.what}{self.kept + self.count:,} of {self.total:,} images, {also}"
            f"{rate:,.0f} images/s, {eta} left"
        )
