"""The cache folder, which all runs share, and how folders and archives in it are written."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddp_ssl.utils.once import warn_once
from ddp_ssl.utils.progress import EVERY_S

logger = logging.getLogger("ddp_ssl")

STALE = 24 * 3600  # seconds after which a half-written folder has lost its writer


def cache_folder() -> Path:
    """`$DDP_SSL_CACHE`, else `$XDG_CACHE_HOME/ddp_ssl`, else `~/.cache/ddp_ssl`."""
    own, shared = os.environ.get("DDP_SSL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    return (Path(shared) if shared else Path.home() / ".cache") / "ddp_ssl"


@contextlib.contextmanager
def locked(file: Path, does: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `file` + `.lock`, after any other process of this machine that `does` the same.

    Without a lock where there can be none.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file.with_name(f"{file.name}.lock").open("w"))
            wait_for(lock.fileno(), does, tell)
        yield


def wait_for(lock: int, does: str, tell: Callable[[str], None]) -> None:
    """Lock an open file; says every half a minute what another process `does` meanwhile."""
    said = -EVERY_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - said > 6 * EVERY_S:
                said = time.monotonic()
                tell(f"waiting for another process that {does}")
            time.sleep(0.2)


def write_atomically(
    folder: Path, write: Callable[[Path], None], outdated: Callable[[], bool] = lambda: False
) -> None:
    """Write a folder under another name, then rename it: it is complete or absent.

    If several processes do this at the same time, one wins and the others use its folder. An
    existing folder stays, unless it is `outdated()` when the new one is ready.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it for the owner alone
        if folder.is_dir() and outdated():
            _set_aside(folder)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    """Rename a folder to make room for a newer one; only one old folder is kept.

    Other machines may have its files mapped into memory. A network file system invalidates the
    pages of a removed file, but not those of a renamed one.
    """
    with contextlib.suppress(OSError):
        for other in folder.parent.glob(f".{folder.name}-*"):
            if time.time() - other.stat().st_mtime > STALE:
                shutil.rmtree(other, ignore_errors=True)
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)


def kept(file: Path) -> dict[str, Any] | None:
    """The arrays of an archive, in memory; None if there is none or if it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:  # its checksums are checked
            return dict(arrays)
    except FileNotFoundError:
        return None
    except Exception:  # a damaged archive makes numpy raise anything
        if file.exists():
            logger.warning("%s is damaged: the files of the data are read through again", file)
        return None


def keep(file: Path, arrays: Mapping[str, Any]) -> None:
    """Write an archive, whole or not at all; says so where that is not possible."""
    # Nodes share the folder, and two of them may give the same number to a process.
    part = file.with_name(f".{file.stem}-{os.uname().nodename}-{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(part, **arrays)
            part.rename(file)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    except OSError as error:
        warn_once(
            f"DDP_SSL_CACHE: {cache_folder()} cannot be written ({error.strerror}): the files of "
            "the data are read through again at every start; accepted: a folder to keep what was "
            "found in"
        )
