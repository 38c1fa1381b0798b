"""stdin, stdout and stderr: closed ones, those whose reader has gone, and other encodings."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import TextIO

from ddp_ssl.utils.launcher import rank_and_size


def open_streams() -> None:
    """Open stdin, stdout and stderr on /dev/null where they are closed; make any text printable.

    Else the next file that is opened gets such a number, and with it what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(number, "w", buffering=1, closefd=False)
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def own_rank() -> int:
    """The rank of this process; 0 where the launcher's variables are no numbers."""
    with contextlib.suppress(ValueError):
        return rank_and_size()[0]
    return 0


def say(text: str) -> None:
    """Print on stdout of rank 0, if it can be written."""
    if own_rank() == 0:
        try:
            print(text, flush=True)
        except OSError:
            drop(sys.stdout)


def tell(text: str) -> None:
    """Print on stderr of rank 0, if it can be written."""
    if own_rank() == 0:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def flush() -> OSError | None:
    """Write what stdout and stderr hold back; returns the error of stdout, if any.

    One that cannot be written is /dev/null from then on: Python writes again when it ends.
    """
    _flush(sys.stderr)
    return _flush(sys.stdout)


def _flush(stream: TextIO) -> OSError | None:
    try:
        stream.flush()
    except OSError as error:
        drop(stream)
        return error
    return None


def stdout_is_broken() -> bool:
    """Whether stdout is a pipe whose reader has gone."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except Exception:  # no file: a text in memory
        return False
    return any(flags & select.POLLERR for _, flags in poll.poll(0))


def drop(stream: TextIO) -> None:
    """Send a stream to /dev/null."""
    with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
