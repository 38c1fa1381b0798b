"""Work in a background thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Do `work` in a thread of its own, which Python's exit waits for."""
    thread = ThreadPoolExecutor(1, "background")
    future = thread.submit(work)
    thread.shutdown(wait=False)
    return future
