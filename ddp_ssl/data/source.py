"""The encoded images of coming batches, read ahead in threads; what cannot be used is replaced.

Reading here rather than in DALI hides the latency of a network file system behind as many threads
as it takes, serves files and shards alike, and knows the file of every error. Nearly all bad files
are found before DALI sees them; for the rest `TrainLoader` goes back and asks `examine`.
"""

from __future__ import annotations

import errno
import io
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ddp_ssl.data.manifest import Split
from ddp_ssl.data.order import Ids, Order, hashed
from ddp_ssl.data.verify import Bytes, Decoder, first_line, worth_trying

Loaded = Bytes | str  # an encoded image, or why there is none
Agree = Callable[[dict[int, str]], dict[int, str]]

DEPTH = 2  # batches read ahead of those that DALI has
# These say what is there; anything else may pass, as a server that is restarted.
FINAL = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}
RETRIES = (0.1, 1.0)  # seconds
ATTEMPTS = 100  # at finding a replacement


class UnreadableError(RuntimeError):
    """So many images cannot be used that there is nothing to replace them with."""


class BadImages:
    """What cannot be used, by what a person would look for, with the reason."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.fresh: dict[str, str] = {}
        """Those that the other processes have not been told of."""

    def add(self, where: str, reason: str) -> None:
        if where not in self.known:
            self.known[where] = self.fresh[where] = reason


def write_list(path: Path, listed: dict[str, str], mode: Literal["w", "a"] = "w") -> None:
    """Bad images and reasons as a file that `data.skip` takes; names may be any bytes."""
    with path.open(mode, encoding="utf-8", errors="surrogateescape") as file:
        for where, reason in listed.items():
            file.write(" ".join(where.splitlines()) + f"\t{reason}\n")


class Reader:
    """The images of a split, by id: bytes that decode, or why not.

    `take` is for one thread; it reads in many. `ids_of(step)` are the images of a batch.
    """

    def __init__(
        self,
        split: Split,
        ids_of: Callable[[int], Ids],
        *,
        threads: int,
        device_id: int | None,
        bad: BadImages,
    ) -> None:
        self.split, self.ids_of, self.bad = split, ids_of, bad
        self.problems: dict[int, str] = {}
        self._sound: set[int] = set()  # odd to look at, but they decode
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "ddp_ssl-read")
        self._asked: dict[int, list[Future[list[Loaded]]]] = {}
        self._decoder, self._one_at_a_time = Decoder(device_id), threading.Lock()

    def take(self, step: int) -> list[Loaded]:
        """The batch of `step`; those after it are being read meanwhile."""
        self._asked = {s: parts for s, parts in self._asked.items() if s >= step}
        for ahead in range(step, step + DEPTH + 1):
            if ahead not in self._asked:
                parts = np.array_split(self.ids_of(ahead), self._threads)
                self._asked[ahead] = [self._pool.submit(self.load, p) for p in parts if len(p)]
        parts_read = self._asked.pop(step)
        return [loaded for part in parts_read for loaded in part.result()]

    def load(self, ids: Iterable[int]) -> list[Loaded]:
        """Images `ids`, one after the other; for any thread."""
        return [self._load(int(i)) for i in ids]

    def _load(self, i: int) -> Loaded:
        if i < 0:
            return PADDING
        if i in self.problems:
            return self.problems[i]
        for pause in (*RETRIES, None):
            try:
                encoded = self.split.read(i)
            except OSError as error:
                if error.errno in FINAL or pause is None:
                    return first_line(error)
                time.sleep(pause)
            else:
                break
        if worth_trying(encoded) or i in self._sound:
            return encoded
        return self.problem(encoded, i) or encoded

    def problem(self, encoded: Bytes, i: int) -> str | None:
        """Why DALI cannot decode image `i`, or None; slow, and sure."""
        with self._one_at_a_time:
            found = self._decoder.problem(encoded)
        if found is None:
            self._sound.add(i)
        return found

    def remember(self, found: dict[int, str]) -> None:
        """These images are bad from now on."""
        for i, reason in found.items():
            if i not in self.problems:
                self.problems[i] = reason
                if self.split.shards is not None:
                    reason += f" (in {self.split.shards.path_of(i)})"
                self.bad.add(self.split.where(i), reason)

    def examine(self, steps: Iterable[int]) -> dict[int, str]:
        """Decode all images of some batches; those that fail are remembered and returned."""
        found = {}
        for i in dict.fromkeys(int(i) for step in steps for i in self.ids_of(step)):
            if i < 0 or i in self.problems:
                continue
            (loaded,) = self.load([i])
            reason = loaded if isinstance(loaded, str) else self.problem(loaded, i)
            if reason is not None:
                found[i] = reason
        self.remember(found)
        return found


class TrainSource:
    """Batches of a training order in which every bad image is replaced by another one.

    The replacement is a pure function of the seed, the step and the image, so that every process
    that reads the image puts the same in its place; `agree` makes a bad image of one process a bad
    image of its whole view group. All other images stay as they are, in their places.
    """

    def __init__(self, reader: Reader, order: Order, agree: Agree) -> None:
        self.reader, self.order, self.agree = reader, order, agree
        self._agreed: dict[int, bool] = {}

    def batch(self, step: int) -> tuple[list[Bytes], Ids]:
        """Encoded images and their ids, int64 `[n]`."""
        ids = self.order.ids(step).copy()
        loaded = self.reader.take(step)
        tried = np.zeros(len(ids), np.int64)
        # After an error batches come again; what was agreed on then holds, the others do not wait.
        again = step in self._agreed
        while True:
            found = {int(i): x for i, x in zip(ids, loaded, strict=True) if isinstance(x, str)}
            if not again:
                found = self.agree(found)
            self.reader.remember(found)
            places = [p for p, i in enumerate(ids) if int(i) in self.reader.problems]
            if not places:
                break
            for place in places:
                ids[place], loaded[place] = self._replace(step, place, tried)
        self._agreed = {s: True for s in (*self._agreed, step) if s > step - 64}
        return [x for x in loaded if not isinstance(x, str)], ids

    def _replace(self, step: int, place: int, tried: Ids) -> tuple[int, Loaded]:
        """Another image for a place of the batch, one that decodes as far as is known."""
        original = int(self.order.ids(step)[place])
        batch = self.order.global_ids(step)
        while tried[place] < ATTEMPTS:
            tried[place] += 1
            key = (self.order.seed, "replacement", step, original, int(tried[place]))
            other = hashed(*key) % self.order.size
            # Twice in a batch it would be its own negative.
            if other in batch and tried[place] < ATTEMPTS // 2:
                continue
            (loaded,) = self.reader.load([other])
            if not isinstance(loaded, str):
                reason = self.reader.problem(loaded, other)
                if reason is None:
                    return other, loaded
                loaded = reason
            self.reader.remember({other: loaded})
        known = self.reader.problems
        raise UnreadableError(
            f"of {ATTEMPTS} images tried in place of {self.reader.split.where(original)} "
            f"({known.get(original)}) none can be used; {len(known)} are known to be bad"
        )


class EvalSource:
    """Batches of an evaluation, in which a bad image becomes padding: some image, with id -1."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def batch(self, step: int) -> tuple[list[Bytes], Ids]:
        """Encoded images and their ids, int64 `[n]`, -1 for padding."""
        ids = self.reader.ids_of(step).copy()
        loaded = self.reader.take(step)
        found = {int(i): x for i, x in zip(ids, loaded, strict=True) if isinstance(x, str)}
        self.reader.remember(found)
        ids[[int(i) in self.reader.problems for i in ids]] = -1
        return [x if i >= 0 and not isinstance(x, str) else PADDING
                for i, x in zip(ids, loaded, strict=True)], ids  # fmt: skip


def _padding() -> Bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


PADDING = _padding()
