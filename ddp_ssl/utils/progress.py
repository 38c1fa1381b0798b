"""Progress lines of long work: of tools on stderr, of evaluations through the log."""

import logging
import os
import threading
import time

from ddp_ssl.utils.streams import tell

EVERY_S = 5.0  # seconds between lines
logger = logging.getLogger("ddp_ssl")


class Progress:
    """A line on stderr every few seconds; for any number of threads. `what` begins the line."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.count, self.kept = what, total, 0, 0
        self.start = self.said = time.monotonic()
        self.lock = threading.Lock()

    def add(self, count: int = 1, also: str = "") -> None:
        """Count `count` more images as done; `also` is a part of the next line."""
        with self.lock:
            self.count += count
            if time.monotonic() - self.said > EVERY_S:
                self.said = time.monotonic()
                self.say(also)

    def keep(self, count: int) -> None:
        """Count `count` images as done before this process started."""
        with self.lock:
            self.kept += count

    def say(self, also: str = "") -> None:
        """Print how many images are done, the rate and the time left."""
        rate = self.count / max(time.monotonic() - self.start, 1e-3)
        left = self.total - self.kept - self.count
        eta = time.strftime("%H:%M:%S", time.gmtime(left / rate)) if rate else "?"
        tell(
            f"{self.what}{self.kept + self.count:,} of {self.total:,} images, {also}"
            f"{rate:,.0f} images/s, {eta} left"
        )


class Ticker:
    """A progress line in the log: rewritten in place in a terminal, else every ten seconds."""

    def __init__(self, what: str, total: int, speaks: bool) -> None:
        self.what, self.total, self.speaks = what, total, speaks
        self.start = self.said = time.perf_counter()
        self.in_place = os.isatty(2)

    def at(self, done: int, more: str = "") -> None:
        """Log that `done` of the total are done, if the last line is old enough."""
        now = time.perf_counter()
        if not self.speaks or now - self.said < (0.2 if self.in_place else 2 * EVERY_S):
            return
        self.said = now
        left = (now - self.start) * (self.total - done) / max(done, 1)
        logger.info(
            "%s: %d of %d%s, %.0f s left", self.what, done, self.total, more, left,
            extra={"progress": True},
        )  # fmt: skip
