"""Asking a run to stop: signals that only set a flag, and a STOP file.

Imported before torch, so that a signal during the slow imports is not lost. The loop reads the
flag between steps; every process then saves together and leaves with exit code 0.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._last_look = 0.0

    def install(self) -> StopRequest:
        """Catch SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C; a second Ctrl-C ends at once."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.reason == "SIGINT":
            os._exit(130)
        self.reason = name

    def look_for(self, stop_file: Path | None) -> bool:
        """Whether to stop; looks for the file, if there is one, at most once a second."""
        if stop_file and self.reason is None and time.monotonic() - self._last_look > 1:
            self._last_look = time.monotonic()
            if stop_file.exists():
                self.reason = stop_file.name
        return self.reason is not None
