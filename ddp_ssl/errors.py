"""The errors that end a run, and what users' input causes. Each message is one line for people."""

import contextlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "<")
LONGEST = 300  # characters of another library's text in a message


def printable(text: str) -> str:
    """Text as one line: line breaks, escape codes and the like are written as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(ValueError):
    """The user asked for something that cannot be run; the message is one line for the user."""

    together = False
    """All processes raise it together, so that rank 0 alone has to say it."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class BuildError(ConfigError):
    """An error during start-up that a restart may cure."""


def reason(error: BaseException) -> str:
    """An error as one line: what the system says of a file, else the text of the error.

    A type that says more than its text is named. So is the place in a user's own code.
    """
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        return error.strerror if name is None else f"{os.fsdecode(name)}: {error.strerror}"
    text = " ".join(str(error).split())
    if text and isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        return text
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    # Python's own files, installed packages and this one are not what a user would open.
    if frames and not any(map(frames[-1].filename.startswith, (str(HERE), sys.prefix, *LIBRARY))):
        text += f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return text


@contextlib.contextmanager
def refused(what: str, accepted: str = "") -> Iterator[None]:
    """Whatever a user's input causes in the block becomes a `ConfigError`: what, why, accepted.

    `what`: the key, the file or the argument, and what is wrong with it. `accepted`: what would be
    accepted instead. A fault of a disk that may pass is a `BuildError`. The cause stays with the
    error. A lack of memory is not the input's fault, and passes through.
    """
    try:
        yield
    except ConfigError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        why = reason(error)
        if isinstance(error, OSError) and error.strerror and str(error.filename) in what:
            why = error.strerror
        end = f"; {accepted}" if accepted else ""
        kind = BuildError if isinstance(error, OSError) and may_pass(error) else ConfigError
        raise kind(f"{what}: {cut(why)}{end}") from error


def cut(text: str, limit: int = LONGEST) -> str:
    """The text; beyond `limit` characters its middle is left out."""
    if len(text) <= limit:
        return text
    half = (limit - len(" ... ")) // 2
    return f"{text[:half]} ... {text[len(text) - half :]}"


def may_pass(error: OSError) -> bool:
    """Whether trying again may help: not where a file is missing, forbidden or of another kind."""
    lasting = FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError
    return error.errno is not None and not isinstance(error, lasting | IsADirectoryError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the older ones are intact."""


class SaveError(RuntimeError):
    """Too many saves in a row failed."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


class BadDataError(RuntimeError):
    """More images are bad than `data.max_bad_fraction` allows."""


class VanishedError(BadDataError):
    """The images can no longer be read; an object store's may be at a later start."""


class ViewGroupError(RuntimeError):
    """Processes that share the views of an image did not read the same images."""


class MeasurementError(RuntimeError):
    """A method's measurement between epochs failed; raised on all processes."""
