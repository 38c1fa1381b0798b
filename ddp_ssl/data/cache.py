"""The folder for what is made once and used by every run, and how it is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """`$DDP_SSL_CACHE`, else `$XDG_CACHE_HOME/ddp_ssl`, else `~/.cache/ddp_ssl`."""
    own, shared = os.environ.get("DDP_SSL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    return (Path(shared) if shared else Path.home() / ".cache") / "ddp_ssl"


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under another name, then rename it: it is there whole or not at all.

    Of processes that do this at the same time one wins, and the others use what it wrote.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)  # mkdtemp's is for the owner alone
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
