"""An action that may fail, on all processes together."""

from collections.abc import Callable
from typing import TypeVar, cast

from ddp_ssl.distributed import World
from ddp_ssl.errors import BuildError, ConfigError, reason

T = TypeVar("T")


def on_all_ranks(world: World, action: Callable[[], T]) -> T:
    """Call `action` on every rank. If it fails on one rank, it fails on all, so that none waits.

    Errors that a user can mend (`ValueError`, `OSError`) become the same `ConfigError` on every
    rank, which rank 0 prints; on the rank where it happened the error itself is its cause. Any
    other error is raised where it happened, and as a `ConfigError` that names the rank elsewhere.
    """
    result: T | None = None
    problem: str | None = None
    fatal = True
    own: Exception | None = None
    try:
        result = action()
    except Exception as error:
        own, problem = error, reason(error)
        fatal = isinstance(error, ValueError) and not isinstance(error, BuildError)
    problems = world.gather_objects((problem, fatal)) or []
    failed = next(((r, *p) for r, p in enumerate(problems) if p[0] is not None), None)
    first = world.broadcast_object(failed)
    try:
        if own is not None and not isinstance(own, OSError | ValueError):
            raise own
        if first is not None:
            rank, problem, fatal = first
            kind = ConfigError if fatal else BuildError
            raise kind(problem + (f" [rank {rank}]" if rank else "")) from own
    finally:
        del own  # its traceback holds this frame: a circle that keeps what the action had made
    return cast(T, result)


def on_rank_0(world: World, action: Callable[[], T]) -> T:
    """Call `action` on rank 0 alone; every rank gets its result, or its error as `on_all_ranks`."""
    result = on_all_ranks(world, lambda: action() if world.is_main else None)
    return cast(T, world.broadcast_object(result))
