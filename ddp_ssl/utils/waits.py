"""What shortens a process's waits for an object store that is away."""

import math
import threading

leaving = threading.Event()
"""Set when the process is about to end: nothing waits for a store any more."""


class Limits:
    """Plain attributes, since a signal handler sets one."""

    timeout_s = math.inf
    """Of the run: without progress for so long it is ended."""
    asked = False
    """Whether the run is to stop."""


limits = Limits()
own = threading.local()
"""`own.stop`: an event of the thread; once it is set, nobody wants the thread's work any more."""


def heed(stop: threading.Event) -> None:
    """The start of a pool's thread, whose work is not wanted once `stop` is set."""
    own.stop = stop


def is_wanted() -> bool:
    """Whether the work of this thread is wanted still."""
    stop = getattr(own, "stop", None)
    return not (leaving.is_set() or (stop is not None and stop.is_set()))
