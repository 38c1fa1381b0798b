"""Asking a run to stop: signals that only set a flag, a STOP file, and a deadline.

Imported before torch, so that a signal during the slow imports is not lost. The loop reads the
flag between steps; every process then saves together and leaves with exit code 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from ddp_ssl.utils.launcher import rank_and_size
from ddp_ssl.utils.waits import limits

logger = logging.getLogger("ddp_ssl")

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
ANSWER = "stopping as soon as possible"  # during a start, a validation or a save too
# The terminal sends a Ctrl-C to all workers, and torchrun sends it to them again.
ONE_KEYSTROKE_S = 1.0
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.started = time.time()
        self.reason: str | None = None
        self._deadline = float("inf")
        self._deadline_name = ""
        self._last_look = 0.0
        limits.asked = False

    def install(self) -> StopRequest:
        """Catch SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and Ctrl-C; a second Ctrl-C ends at once.

        Under `nohup` SIGHUP stays ignored.
        """
        for number in REQUESTS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        keyboard.listen()
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        limits.asked = True

    def at(self, deadline: float, name: str) -> None:
        """Stop at this time (seconds since 1970) too; the earliest deadline counts."""
        if deadline < self._deadline:
            self._deadline, self._deadline_name = deadline, name

    def look_for(self, stop_file: Path | None) -> bool:
        """Whether to stop; looks for the file, if there is one, at most once a second."""
        if self.reason is not None:
            return True
        if time.time() >= self._deadline:
            self.reason = self._deadline_name
        elif stop_file and time.monotonic() - self._last_look > 1:
            self._last_look = time.monotonic()
            if os.path.exists(stop_file):  # False where a mount fails, which Path would raise
                self.reason = stop_file.name
        if self.reason is not None:
            limits.asked = True
            logger.info("%s: %s", self.reason, ANSWER)
        return self.reason is not None


class Keyboard:
    """Answers a request at once, and ends the process at a second Ctrl-C, also in a collective.

    Python runs signal handlers between two instructions of the main thread, and a collective may
    be a long instruction. The signal's number is written to a pipe at once; a thread reads it.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._answered = False
        self._write: int | None = None

    def listen(self) -> None:
        """Begin to listen; earlier presses do not count."""
        self._first, self._answered = None, False
        if self._write is None:
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            threading.Thread(target=self._hear, args=[read], name="keyboard", daemon=True).start()
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def _hear(self, read: int) -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGINT:
                self.pressed(time.monotonic())
            if number[0] in REQUESTS and not self._answered:
                self._answered = True
                answer(signal.Signals(number[0]))

    def pressed(self, now: float) -> None:
        """Ctrl-C at this time, in seconds of any clock."""
        if self._first is not None and now - self._first > ONE_KEYSTROKE_S:
            os._exit(130)
        self._first = now if self._first is None else self._first


def answer(number: signal.Signals) -> None:
    """One line on stderr, from rank 0. Logging's locks may be held by the thread that is blocked.

    The line of progress in a terminal has no end.
    """
    if rank_and_size()[0]:
        return
    line = f"{ANSWER}; Ctrl-C again stops now" if number == signal.SIGINT else (
        f"{number.name}: {ANSWER}"
    )  # fmt: skip
    with contextlib.suppress(OSError):  # a terminal that was closed
        os.write(2, f"{chr(10) * os.isatty(2)}{line}\n".encode())


keyboard = Keyboard()


def stop_with_parent() -> None:
    """Get SIGTERM when torchrun's agent dies; its workers would run on otherwise."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGTERM)
