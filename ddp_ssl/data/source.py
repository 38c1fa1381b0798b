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

from ddp_ssl.data.formats import Decoding
from ddp_ssl.data.manifest import Split
from ddp_ssl.data.order import Ids, Order, hashed
from ddp_ssl.data.verify import Bytes, Decoder, first_line, worth_trying

Loaded = Bytes | str  # an encoded image, or why there is none
Agree = Callable[[dict[int, str]], dict[int, str]]

DEPTH = 2  # batches read ahead of those that DALI has
# These say what is there; anything else may pass, as a server that is restarted.
FINAL = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}
OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # say nothing about the image
RETRIES = (0.1, 1.0)  # seconds
ATTEMPTS = 100  # at finding a replacement


class UnreadableError(RuntimeError):
    """There is no batch: nothing to put in a bad image's place, or no way to. One line."""


class BadImages:
    """What cannot be used, by what a person would look for, with the reason; one for a run."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.fresh: dict[str, str] = {}
        """Those that the other processes have not been told of."""
        self._by_split: dict[str, dict[int, str]] = {}

    def of(self, split: Split) -> dict[int, str]:
        """The bad images of a split by id, the same for all its readers."""
        return self._by_split.setdefault(split.digest, {})

    def add(self, where: str, reason: str) -> None:
        """One more, if it is not known."""
        if where not in self.known:
            self.known[where] = self.fresh[where] = reason

    def copy(self, split: Split) -> BadImages:
        """What is known of `split` now, for a reader in another thread."""
        mine = BadImages()
        mine.known = dict(self.known)
        mine.of(split).update(self.of(split))
        return mine

    def take(self, other: BadImages, split: Split) -> None:
        """What a copy came upon since."""
        for where, reason in other.fresh.items():
            self.add(where, reason)
        self.of(split).update(other.of(split))


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
        decoding: Decoding,
        bad: BadImages,
    ) -> None:
        self.split, self.ids_of, self.bad = split, ids_of, bad
        self.problems = bad.of(split) if split.images is None else {}
        self._sound: set[int] = set()  # odd to look at, but they decode
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "ddp_ssl-read")
        self._asked: dict[int, list[Future[list[Loaded]]]] = {}
        self._decoder, self._one_at_a_time = Decoder(device_id, decoding), threading.Lock()

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
                if error.errno in OURS:
                    raise
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

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def examine(self, ids: Iterable[int]) -> bool:
        """Decode images; those that fail are remembered. Whether any did."""
        found = {}
        for i in dict.fromkeys(int(i) for i in ids):
            if i < 0 or i in self.problems:
                continue
            (loaded,) = self.load([i])
            reason = loaded if isinstance(loaded, str) else self.problem(loaded, i)
            if reason is not None:
                found[i] = reason
        self.remember(found)
        return bool(found)


class TrainSource:
    """Batches of a training order in which every bad image is replaced by another one.

    The replacement is a function of the seed, the step and the image, so that every process that
    reads the image puts the same in its place. `agree` is called in rounds, as often on each member
    of a view group, and makes a bad image of one process a bad image of all. All other images stay
    as they are, in their places.
    """

    def __init__(self, reader: Reader, order: Order, agree: Agree) -> None:
        self.reader, self.order, self.agree = reader, order, agree
        self._settled: dict[int, tuple[Ids, Ids]] = {}  # the ids of late steps, and tries at each
        self.failed: tuple[int, str] | None = None
        """The first step for which there is no batch, and why."""

    def batch(self, step: int) -> tuple[list[Bytes], Ids]:
        """Encoded images and their ids, int64 `[n]`.

        If nothing can replace an image, `failed` says so and padding stands in: DALI asks for
        batches ahead of the run, so that it can still be stopped in order.
        """
        original = self.order.ids(step)
        loaded = self.reader.take(step)
        # After an error batches come again. What was agreed on then holds, and nobody is asked:
        # what DALI alone found bad, it finds on every process that decodes it.
        again = step in self._settled
        if again:
            ids, tried = self._settled[step]
            for place in np.flatnonzero(ids != original):
                (loaded[place],) = self.reader.load([ids[place]])
        else:
            ids, tried = original.copy(), np.zeros(len(original), np.int64)
        while True:
            # Also those that are known, whose bytes had been read before they were.
            found = {
                int(i): x if isinstance(x, str) else self.reader.problems[int(i)]
                for i, x in zip(ids, loaded, strict=True)
                if isinstance(x, str) or int(i) in self.reader.problems
            }
            found = found if again else self.agree(found)
            self.reader.remember(found)
            places = [place for place, i in enumerate(ids) if int(i) in found]
            if not places:
                break
            if tried.max() >= ATTEMPTS:
                self.failed = self.failed or (step, self._why(original, ids, found))
                loaded = [PADDING] * len(ids)
                break
            for place in places:
                ids[place] = self._candidate(step, place, ids, tried)
                (loaded[place],) = self.reader.load([ids[place]])
                encoded = loaded[place]
                if not isinstance(encoded, str):
                    loaded[place] = self.reader.problem(encoded, int(ids[place])) or encoded
        self._settled = {s: x for s, x in self._settled.items() if s > step - 64}
        self._settled[step] = ids, tried
        return [x for x in loaded if not isinstance(x, str)], ids.copy()

    def mend(self, steps: Iterable[int]) -> bool:
        """Whether bad images among these batches, which DALI had, explain that it stopped.

        They are replaced when the batches come again.
        """
        ids = [int(i) for step in steps for i in self._settled.get(step, ((), ()))[0]]
        known = any(i in self.reader.problems for i in ids)  # found since, by another reader
        return self.reader.examine(ids) or known

    def _candidate(self, step: int, place: int, ids: Ids, tried: Ids) -> int:
        """The next image to try in a place; nothing that only this process knows may matter."""
        original, batch = int(self.order.ids(step)[place]), self.order.global_ids(step)
        while True:
            tried[place] += 1
            key = (self.order.seed, "replacement", step, original, int(tried[place]))
            other = hashed(*key) % self.order.size
            # Twice in a batch it would be its own negative; where the batch is nearly all there
            # is, that has to be.
            if tried[place] > ATTEMPTS // 2 or not (other in batch or other in ids):
                return other

    def _why(self, original: Ids, ids: Ids, found: dict[int, str]) -> str:
        place = next(p for p, i in enumerate(ids) if int(i) in found)
        split, problems = self.reader.split, self.reader.problems
        return (
            f"nothing can take the place of {split.where(int(original[place]))} "
            f"({problems.get(int(original[place]))}): of {ATTEMPTS} other images tried none can "
            f"be used; {len(problems)} are known to be bad"
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
