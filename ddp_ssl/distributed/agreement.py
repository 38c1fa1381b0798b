"""An action that may fail, on all processes together."""

from collections.abc import Callable
from typing import TypeVar, cast

from ddp_ssl.distributed import World
from ddp_ssl.errors import BuildError, ConfigError
from ddp_ssl.utils.text import one_line

T = TypeVar("T")


def on_all_ranks(world: World, action: Callable[[], T]) -> T:
    """Call `action` on every rank. If it fails on one rank, it fails on all, so that none waits.

    Errors that a user can mend (`ValueError`, `OSError`) become the same `ConfigError` on every
    rank, which rank 0 prints. Any other error is raised where it happened, and as a `ConfigError`
    that names the rank elsewhere.
    """
    result: T | None = None
    problem: str | None = None
    fatal = True
    unexpected: Exception | None = None
    try:
        result = action()
    except OSError as error:
        fatal = False
        problem = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
    except ValueError as error:
        problem = one_line(error)
    except Exception as error:
        unexpected, fatal = error, False
        problem = one_line(f"{type(error).__name__}: {error}")
    problems = world.gather_objects((problem, fatal)) or []
    failed = next(((r, *p) for r, p in enumerate(problems) if p[0] is not None), None)
    first = world.broadcast_object(failed)
    if unexpected is not None:
        raise unexpected
    if first is not None:
        rank, problem, fatal = first
        kind = ConfigError if fatal else BuildError
        raise kind(problem + (f" [rank {rank}]" if rank else ""))
    return cast(T, result)
