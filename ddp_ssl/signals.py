"""Asking a run to stop: signals that only set a flag, a STOP file, and a deadline.

Imported before torch, so that a signal during the slow imports is not lost. The loop reads the
flag between steps; every process then saves together and leaves with exit code 0.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from types import FrameType

# torchrun passes a Ctrl-C on to workers that the terminal has told already.
ONE_KEYSTROKE_S = 1.0
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.started = time.time()
        self.reason: str | None = None
        self._interrupted = 0.0
        self._deadline = float("inf")
        self._deadline_name = ""
        self._last_look = 0.0

    def install(self) -> StopRequest:
        """Catch SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C; a second Ctrl-C ends at once."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now - self._interrupted > ONE_KEYSTROKE_S:
                os._exit(130)
            self._interrupted = self._interrupted or now
        self.reason = self.reason or signal.Signals(number).name

    def at(self, deadline: float, name: str) -> None:
        """Stop at this time (seconds since 1970) too; the earliest deadline counts."""
        if deadline < self._deadline:
            self._deadline, self._deadline_name = deadline, name

    def look_for(self, stop_file: Path | None) -> bool:
        """Whether to stop; looks for the file, if there is one, at most once a second."""
        if self.reason is None and time.time() >= self._deadline:
            self.reason = self._deadline_name
        if stop_file and self.reason is None and time.monotonic() - self._last_look > 1:
            self._last_look = time.monotonic()
            if stop_file.exists():
                self.reason = stop_file.name
        return self.reason is not None


def stop_with_parent() -> None:
    """SIGTERM when torchrun's agent dies, which would otherwise leave its workers running."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGTERM)
