"""Shared by all commands: errors in one line, exit codes, and the start and end of the processes.

Imports torch only where processes are started, so that `--help` and errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import ddp_ssl
from ddp_ssl.config import ConfigError, Data
from ddp_ssl.errors import cut, printable, reason
from ddp_ssl.utils.launcher import cpu_share, wait_for_rank_0
from ddp_ssl.utils.streams import flush, open_streams, own_rank, stdout_is_broken, tell
from ddp_ssl.utils.text import one_line, suggest
from ddp_ssl.utils.waits import leaving, limits

if TYPE_CHECKING:
    from ddp_ssl.distributed import World
    from ddp_ssl.evals.settings import EvaluateRun

Row = tuple[str, str, str, str]
"""Of the reference: key, type, default, description."""
HELP_WIDTH = 79  # columns
SHOW = "DDP_SSL_TRACEBACK"
# Exit codes.
UNUSABLE = 2  # the config, the data or the command line cannot be used
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    Input that cannot be used (`ValueError`, `OSError`) is one line on stderr and 2, Ctrl-C is 130.
    A command whose reader has gone, as with `| head`, is given up: 141, as if by SIGPIPE. The
    environment's `DDP_SSL_TRACEBACK=1` shows where an error was raised.
    """
    open_streams()
    leaving.clear()
    try:
        code = _code_of(command)
    finally:
        leaving.set()
    problem = flush()
    if problem is None or isinstance(problem, BrokenPipeError) or code:
        return code
    return refuse(f"stdout: {reason(problem)}", 1)


def _code_of(command: Callable[[], int]) -> int:
    try:
        return command()
    except SystemExit:
        flush()
        raise
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and stdout_is_broken():
            return BROKEN_PIPE
        if os.environ.get(SHOW):
            traceback.print_exc()
        text = str(error) if isinstance(error, ConfigError) else reason(error)
        return refuse(text, together=getattr(error, "together", False))
    except KeyboardInterrupt as error:
        tell("; ".join(["ddp_ssl: interrupted", *map(str, error.args)]))
        return INTERRUPTED


def check_data(data: Data) -> None:
    """Raise `ValueError` unless the data can be found, before torch's processes are started.

    A file system that fails is left to the run, which may be tried again.
    """
    from ddp_ssl.data.datasets import registry  # brings numpy

    with contextlib.suppress(OSError):
        registry.find(data)


def refuse(error: object, code: int = UNUSABLE, together: bool = False) -> int:
    """Print `error` and return the exit code.

    Rank 0 prints at once. The launcher then ends the other ranks; one that is still there after
    some seconds prints its own, unless all ranks have found it `together` or it is being ended.
    """
    text = printable(str(error))
    tell(f"ddp_ssl: error: {text}")
    if (rank := own_rank()) and not limits.asked:
        wait_for_rank_0()
        if not together:
            with contextlib.suppress(OSError):
                print(f"ddp_ssl: error: rank {rank}: {text}", file=sys.stderr, flush=True)
    return code


def split_options(arguments: Iterable[str]) -> tuple[bool, bool, list[str]]:
    """Whether `--help` and `--print-config` are among the arguments, and all other arguments."""
    words = list(arguments)
    asked = {"-h", "--help", "--print-config"} & set(words)
    rest = [word for word in words if word not in asked]
    return bool(asked & {"-h", "--help"}), "--print-config" in asked, rest


TRUST = "let the run import a method from outside this package (module:Class)"


def split_trust(words: Sequence[str]) -> tuple[str, list[str]]:
    """Code from outside the package that a run's config may import, and all other arguments.

    `*` for `--trust`, `module:Class` for `method.name=module:Class`, else empty.
    """
    named = [word for word in words if re.fullmatch(r"method\.name=[^=]*:.*", word)]
    trusted = named[-1].partition("=")[2] if named else ""
    rest = [word for word in words if word != "--trust" and word not in named]
    return "*" if "--trust" in words else trusted, rest


def is_part(word: str, sections: Iterable[str]) -> bool:
    """Whether a word after `--help` names a section, such as `optim`, or a key in one."""
    return "=" not in word and word.partition(".")[0] in sections


def rows_of(parts: Sequence[str], rows: Iterable[Row]) -> list[Row]:
    """The rows of these sections and keys; all rows without any. Raises `ConfigError`."""
    every = list(rows)
    for part in parts:
        if not any(f"{row[0]}.".startswith(f"{part}.") for row in every):
            raise ConfigError(f"{part}: unknown key{suggest(part, [row[0] for row in every])}")
    return [
        row for row in every
        if not parts or any(f"{row[0]}.".startswith(f"{part}.") for part in parts)
    ]  # fmt: skip


def describe_keys(rows: Iterable[Row], about: Callable[[str], str]) -> Iterator[str]:
    """Lines of a help text: every key below its section. `about`: a section's description."""
    section = ""
    for key, kind, default, text in rows:
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            yield from ["", *_wrapped(f"{section}: {about(section)}".removesuffix(": "), "", "  ")]
        yield from _wrapped(f"{key}  ({kind}, default {default})", "  ", "    ")
        yield from _wrapped(text, " " * 6, " " * 6)


def _wrapped(text: str, first: str, other: str) -> list[str]:
    return textwrap.wrap(
        text, HELP_WIDTH, initial_indent=first, subsequent_indent=other, break_on_hyphens=False
    )


class Parser(argparse.ArgumentParser):
    """A parser that raises `ConfigError`, one line, for what it cannot parse.

    Options are not abbreviated: `--tru` is no consent.
    """

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(f"{message}; --help says what is accepted")


def count(text: str) -> int:
    """A number of at least 1 on a command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def share_import_path() -> None:
    """Let child processes import this very package, whether it is installed or not."""
    paths = [str(Path(ddp_ssl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


@contextlib.contextmanager
def processes(run: EvaluateRun) -> Iterator[World]:
    """The process group of a command that needs one, with logging and threads set up.

    A `ConfigError` must be raised by all processes together. Any other error ends this process at
    once, with exit code 1.
    """
    import torch

    from ddp_ssl import distributed
    from ddp_ssl.logs import console

    world, limits.timeout_s = distributed.start(run.device, run.timeout_s), run.timeout_s
    console.setup_logging(None, world.rank)
    torch.set_num_threads(run.threads or cpu_share())
    try:
        yield world
    except ConfigError as error:
        error.together = True
        distributed.stop()
        raise
    except Exception as error:
        end_alone(error, world)
    distributed.stop()


def end_alone(error: Exception, world: World) -> NoReturn:
    """Log the error and end this process, without leaving the process group in order.

    The other processes may wait for this one in a collective, and leaving in order would wait for
    them. The launcher ends them when this process is gone.
    """
    from ddp_ssl.data.loading.reader import UnreadableError
    from ddp_ssl.distributed import others_failed

    logger, text = logging.getLogger("ddp_ssl"), one_line(error)
    if isinstance(error, UnreadableError):
        logger.error("%s", text)
    elif world.size > 1 and others_failed(error):
        logger.error("another process failed or left: %s", cut(text))
    else:
        logger.error("%s: %s", type(error).__name__, text, exc_info=error)
    raise SystemExit(1) from None
