"""Small files that are whole or absent, and on disk when a call returns."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
TEMPORARY = ".tmp"


def path_of(text: str) -> Path:
    """The path in an argument. `~` is the home folder; a shell leaves it alone in `--out=~/x`."""
    return Path(os.path.expanduser(text))


def if_readable(read: Callable[[], T]) -> T | None:
    """The result of `read`; None whatever it raises, since what it reads is missing or damaged."""
    try:
        return read()
    except Exception:
        return None


def json_file(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is no file, or another thing in it."""
    try:
        return json_mapping(path.read_bytes())
    except OSError:
        return {}


def json_mapping(text: str | bytes) -> dict[str, Any]:
    """The mapping in a JSON text; empty if there is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def replace_text(path: Path, text: str) -> None:
    """Write or replace a small file atomically. Several processes may do so at the same time."""
    with replaced(path) as temporary:
        write_synced(temporary, text)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file to write, which then gets the name `path`; removed if the block raises."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{TEMPORARY}")
    with removed_on_error(temporary):
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError as error:  # it names the temporary file
            raise OSError(error.errno, error.strerror, str(path)) from None


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def removed_on_error(*unfinished: Path) -> Iterator[None]:
    """Remove these files if the block raises."""
    try:
        yield
    except BaseException:
        for path in unfinished:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries, such as renames in it, are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
