"""Files below an address, `s3://`, `gs://`, `https://` or `http://`, and files of this machine.

A place is an address or a path, as text. Reads of a store are tried again until they succeed or the
store has been away for `PATIENCE_S`; for less if the run was asked to stop. What stays wrong is a
`StoreError`, never a bad image: nothing takes the place of an image because a server was away.
obstore is imported where an address is used.
"""

from __future__ import annotations

import errno
import functools
import importlib
import io
import logging
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.config.section import is_url
from ddp_ssl.errors import BuildError, ConfigError, cut, printable
from ddp_ssl.utils.waits import is_wanted, leaving, limits

logger = logging.getLogger("ddp_ssl")

T = TypeVar("T")
Stamp = tuple[int, str]  # bytes, and what changes with the content: ETag or time

PATIENCE_S = 180.0
SHARE = 0.6  # of `run.timeout_s`, after which a run without progress is ended
ASKED_S = 5.0  # the patience of a run that was asked to stop
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
TELL_S = 5.0  # between two lines about a store that is away
CHUNK = 8 << 20  # bytes of a request where files are read in order
BLOCK, BLOCKS = 1 << 20, 64  # bytes of a part of it, and how many are held in memory
THREADS = 32
FINAL = ("NotSupportedError", "InvalidPathError", "UnknownConfigurationKeyError")
MAY_PASS = (408, 425, 429)  # of the client errors
NO_CREDENTIALS = "no credentials were found"
NO_HTTP = "its endpoint is not encrypted (AWS_ALLOW_HTTP=true permits that)"
ENVIRONMENT = "AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS"
random_ = random.Random()  # of its own: the pauses of processes differ, and no seed is disturbed


class StoreError(ConfigError):
    """A store does not give what it should: one line."""


class AwayError(StoreError, BuildError):
    """A store gives no answer, or none that can be used; a later start may find it mended."""


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
        try:
            got = _obstore().get(store, path, options={"range": (at, at + count)})
        except Exception as error:
            if _status(error) == 416:  # it ends before: another file, under the same name
                _is_same(place, tag, _obstore().head(store, path))
            raise
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


@functools.lru_cache(256)
def entries(folder: str) -> list[tuple[str, bool]]:
    """Names in a folder of a store, sorted, and whether each is a folder.

    Raises `OSError` where the store lists nothing, and `StoreError`.
    """
    if folder.startswith("http"):
        raise OSError(
            errno.ENOTSUP, "a web server lists no files: https://HOST/train-{000..099}.* names them"
        )
    store, path = _store(folder)
    found = _patiently(
        folder, lambda: _obstore().list_with_delimiter(store, f"{path}/" if path else None)
    )
    names = [(prefix.rpartition("/")[2], True) for prefix in found["common_prefixes"]]
    return sorted(names + [(one["path"].rpartition("/")[2], False) for one in found["objects"]])


def chunks(place: str, size: int = 0, tag: str | None = None) -> Iterator[bytes | memoryview]:
    """A file in order; raises `OSError`, `StoreError`. `size` and `tag` are for one in a store."""
    if is_url(place):
        for at in range(0, size, CHUNK):
            yield read(place, at, min(CHUNK, size - at), tag).data
        return
    with open(place, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def opened(place: str) -> BinaryIO:
    """A file of a store to read in order or to seek in; raises `StoreError`.

    What is read in order is asked for `CHUNK` bytes at a time, and several readers of a file that
    are at about the same place share that.
    """
    found = _stamp(place)
    if found is None:
        raise _error(place, "404 Not Found")
    return io.BufferedReader(_File(place, *found), BLOCK)


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
        if self.at >= self.size:
            return 0
        number, first = divmod(self.at, BLOCK)
        piece = _block(self, number)[first : first + len(buffer)]
        buffer[: len(piece)] = piece.data
        self.at += len(piece)
        return len(piece)


_blocks: OrderedDict[tuple[str, str, int], NDArray[np.uint8]] = OrderedDict()
_blocks_guard = threading.Lock()


def _block(file: _File, number: int) -> NDArray[np.uint8]:
    """Bytes `number * BLOCK` on, at most `BLOCK`; behind a known block, more are fetched."""

    def key(k: int) -> tuple[str, str, int]:
        return file.place, file.tag, k

    with _blocks_guard:
        if key(number) in _blocks:
            _blocks.move_to_end(key(number))
            return _blocks[key(number)]
        count = CHUNK // BLOCK if key(number - 1) in _blocks else 1
    at = number * BLOCK
    content = read(file.place, at, min(count * BLOCK, file.size - at), file.tag)
    with _blocks_guard:
        for k in range(-(-len(content) // BLOCK)):
            _blocks[key(number + k)] = content[k * BLOCK : (k + 1) * BLOCK]
        while len(_blocks) > BLOCKS:
            _blocks.popitem(last=False)
    return content[:BLOCK]


def forget() -> None:
    """Free the memory of what was read ahead."""
    with _blocks_guard:
        _blocks.clear()


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
        stores = importlib.import_module("obstore.store")
        # `from_url` would take a web address of Amazon's for a bucket.
        make = stores.HTTPStore.from_url if base.startswith("http") else stores.from_url
        return make(base, **how)
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
_answered: set[str] = set()  # hosts and buckets that gave something


def _patience() -> float:
    """Seconds for which a store that is away is asked again."""
    if not is_wanted():
        return 0.0
    return min(PATIENCE_S, SHARE * limits.timeout_s, ASKED_S if limits.asked else PATIENCE_S)


def _patiently(place: str, ask: Callable[[], T]) -> T:
    """The result of `ask`, which is called again while the store is away."""
    global _told
    start, pause = time.monotonic(), FIRST_PAUSE_S
    base = "/".join(place.split("/", 3)[:3])
    while True:
        try:
            result = ask()
            _answered.add(base)
            return result
        except Exception as error:  # obstore's are of many types
            if isinstance(error, StoreError | MemoryError):
                raise
            why = _words(error)
            # Credentials that were there are renewed; a hiccup of who gives them passes.
            if _stays(error) and not (why == NO_CREDENTIALS and base in _answered):
                raise _error(place, why) from None
        now, patience = time.monotonic(), _patience()
        if now - start >= patience:
            raise AwayError(str(_error(place, f"no answer for {now - start:.0f} s ({why})")))
        with _guard:
            say = now - max(start, _told) > TELL_S
            _told = now if say else _told
        if say:
            logger.warning(
                "data.root: %s: %s; trying again, for %.0f s at most", place, why, patience
            )
        leaving.wait(pause * random_.uniform(0.5, 1))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _stays(error: Exception) -> bool:
    """Whether asking again would give the same."""
    if type(error).__name__ in FINAL or _words(error) in (NO_CREDENTIALS, NO_HTTP):
        return True
    status = _status(error)
    return 400 <= status < 500 and status not in MAY_PASS


def _status(error: Exception) -> int:
    """HTTP's status of an answer that is no content; 0 for another error."""
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else 0


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
    return cut(printable(re.sub(r"\S*://\S*", "...", text)))


def _error(place: str, why: str) -> StoreError:
    accepted = "an address and a store that can be read from here"
    if why.startswith(("401", "403", NO_CREDENTIALS)):
        accepted = f"credentials in the environment that may read it, such as {ENVIRONMENT}"
    elif "Range request" in why:
        accepted = "a server that gives ranges of a file, as most do"
    elif why.startswith("404"):
        accepted = "the address of a folder that holds it"
    return StoreError(f"data.root: {place}: {why}; accepted: {accepted}")
