"""Files below an address, `s3://`, `gs://`, `https://` or `http://`, and files of this machine.

A place is an address or a path, as text. Reads of a store are tried again until they succeed or the
store has been away for `PATIENCE_S`. What stays wrong is a `StoreError`, never a bad image: nothing
takes the place of an image because a server was away. obstore is imported where an address is used.
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.config.section import is_url
from ddp_ssl.errors import LONGEST, BuildError, printable

logger = logging.getLogger("ddp_ssl")

T = TypeVar("T")
Stamp = tuple[int, str]  # bytes, and what changes with the content: ETag or time

PATIENCE_S = 180.0  # below `run.timeout_s`, after which a run without progress is ended
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
TELL_S = 5.0  # between two lines about a store that is away
BUFFER = 8 << 20  # bytes of a request where files are read in order
THREADS = 32
FINAL = ("NotSupportedError", "InvalidPathError", "UnknownConfigurationKeyError")
MAY_PASS = (408, 425, 429)  # of the client errors
NO_CREDENTIALS = "no credentials were found"
NO_HTTP = "its endpoint is not encrypted (AWS_ALLOW_HTTP=true permits that)"
ENVIRONMENT = "AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS"
random_ = random.Random()  # of its own: the pauses of processes differ, and no seed is disturbed


class StoreError(BuildError):
    """A store does not give what it should: one line. A later start may find it mended."""


class _OtherAnswer(Exception):
    """An answer with other bytes than those asked for."""


def joined(root: str, name: str) -> str:
    """The place of a file below a root."""
    return f"{root.rstrip('/')}/{name}" if is_url(root) else os.path.join(root, name)


def read(place: str, at: int, count: int, tag: str | None = None) -> NDArray[np.uint8]:
    """Bytes `at` to `at + count` at an address, uint8 `[count]`, in any thread.

    `tag` is the stamp's of the content that is meant. Raises `StoreError`.
    """
    if not count:
        return np.empty(0, np.uint8)
    store, path = _store(place)

    def ask() -> NDArray[np.uint8]:
        got = _obstore().get(store, path, options={"range": (at, at + count)})
        _is_same(place, tag, got.meta)
        content: NDArray[np.uint8] = np.frombuffer(got.bytes(), np.uint8)
        if tuple(got.range) != (at, at + count) or len(content) != count:
            raise _OtherAnswer(f"{len(content)} bytes where {count} were asked for")
        return content

    return _patiently(place, ask)


def content(place: str) -> bytes:
    """A whole small file; raises `OSError` or `StoreError`."""
    if not is_url(place):
        return Path(place).read_bytes()
    store, path = _store(place)
    return _patiently(place, lambda: bytes(_obstore().get(store, path).bytes()))


def stamps(places: Sequence[str]) -> list[Stamp | None]:
    """The stamp of each file, None where there is none; raises `StoreError`."""
    with ThreadPoolExecutor(THREADS, "ddp_ssl-stat") as pool:
        return list(pool.map(_stamp, places))


def _stamp(place: str) -> Stamp | None:
    if not is_url(place):
        try:
            about = os.stat(place)
        except OSError:
            return None
        return about.st_size, str(about.st_mtime_ns)
    store, path = _store(place)

    def ask() -> Stamp | None:
        try:
            found = _obstore().head(store, path)
        except FileNotFoundError:
            return None
        return int(found["size"]), _tag(found)

    return _patiently(place, ask)


def exists(place: str) -> bool:
    """Whether there is such a file; raises `StoreError`."""
    return _stamp(place) is not None


def below(root: str) -> list[tuple[str, Stamp]]:
    """Names, relative to `root`, and stamps of all files below an `s3://` or `gs://` address."""
    store, path = _store(root)

    def ask() -> list[tuple[str, Stamp]]:
        pages = _obstore().list(store, f"{path}/" if path else None)
        start = len(path) + 1 if path else 0
        return [
            (entry["path"][start:], (int(entry["size"]), _tag(entry)))
            for page in pages
            for entry in page
        ]

    return _patiently(root, ask)


def opened(place: str, stamp: Stamp | None = None) -> BinaryIO:
    """A file to read in order or to seek in. A store is asked for much at a time."""
    if not is_url(place):
        return Path(place).open("rb", buffering=0)
    stamp = stamp or _stamp(place)
    if stamp is None:
        raise _error(place, "404 Not Found")
    return io.BufferedReader(_File(place, *stamp), BUFFER)


class _File(io.RawIOBase):
    """An object of a store as a file."""

    def __init__(self, place: str, size: int, tag: str) -> None:
        self.place, self.size, self.tag, self.at = place, size, tag, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self.at))
        buffer[:count] = read(self.place, self.at, count, self.tag).data
        self.at += count
        return count


# --- the store -----------------------------------------------------------------------------------


@functools.cache
def _obstore() -> Any:
    try:
        return importlib.import_module("obstore")
    except ImportError:
        raise ValueError(
            "data.root: object stores are read with obstore, which is not installed: "
            "pip install 'ddp_ssl[remote]', or pip install obstore"
        ) from None


def _store(place: str) -> tuple[Any, str]:
    """The client of a place's store, and the path in it."""
    scheme, _, rest = place.partition("://")
    host, _, path = rest.strip("/").partition("/")
    path = path.strip("/")
    return _client(f"{scheme}://{host}"), unquote(path) if scheme.startswith("http") else path


@functools.cache
def _client(base: str) -> Any:
    _obstore()
    how: dict[str, Any] = {"retry_config": {"max_retries": 0}}  # all attempts are made here
    if base.startswith("http://"):
        how["client_options"] = {"allow_http": True}  # others come from the environment
    try:
        return importlib.import_module("obstore.store").from_url(base, **how)
    except Exception as error:
        raise _error(base, _words(error)) from None


def _tag(meta: Any) -> str:
    return str(meta["e_tag"] or meta["last_modified"])


def _is_same(place: str, tag: str | None, meta: Any) -> None:
    if tag is not None and _tag(meta) != tag:
        raise StoreError(
            f"data.root: {place} has changed since the start, so its images are not those of this "
            "run; accepted: the earlier content, or a new start with this one"
        )


_guard = threading.Lock()
_told = -TELL_S
_own, _never = threading.local(), threading.Event()


def stop_with(stop: threading.Event) -> None:
    """Let this thread wait for a store no longer once `stop` is set."""
    _own.stop = stop


def _patiently(place: str, ask: Callable[[], T]) -> T:
    """The result of `ask`, which is called again while the store is away."""
    global _told
    stop: threading.Event = getattr(_own, "stop", _never)
    start, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return ask()
        except (StoreError, MemoryError):
            raise
        except Exception as error:  # obstore's are of many types
            why = _words(error)
            if _stays(error):
                raise _error(place, why) from None
        now = time.monotonic()
        if now - start > PATIENCE_S or stop.is_set():
            raise _error(place, f"no answer for {now - start:.0f} s ({why})")
        with _guard:
            say = now - max(start, _told) > TELL_S
            _told = now if say else _told
        if say:
            logger.warning(
                "data.root: %s: %s; trying again, for %.0f s at most", place, why, PATIENCE_S
            )
        stop.wait(pause * random_.uniform(0.5, 1))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _stays(error: Exception) -> bool:
    """Whether asking again would give the same."""
    if type(error).__name__ in FINAL or _words(error) in (NO_CREDENTIALS, NO_HTTP):
        return True
    found = re.search(r"status code: (\d{3})", str(error))
    return found is not None and 400 <= int(found[1]) < 500 and int(found[1]) not in MAY_PASS


def _words(error: Exception) -> str:
    """What went wrong, in a few words and without addresses, which may be signed."""
    text = str(error).partition("\n")[0]
    if "169.254" in text:  # where machines of a cloud have credentials
        return NO_CREDENTIALS
    if text.endswith("builder error"):
        return NO_HTTP
    if found := re.search(r"status code: (\d{3}[\w ]*)", text):
        return found[1].strip()
    text = re.sub(r"^(Generic )?\w+ error: ", "", text.rpartition(" - ")[2])
    return printable(re.sub(r"\S*://\S*", "...", text))[:LONGEST]


def _error(place: str, why: str) -> StoreError:
    accepted = "an address and a store that can be read from here"
    if why.startswith(("401", "403", NO_CREDENTIALS)):
        accepted = f"credentials in the environment that may read it, such as {ENVIRONMENT}"
    elif why.startswith("404"):
        accepted = "the address of a folder that holds it"
    return StoreError(f"data.root: {place}: {why}; accepted: {accepted}")
