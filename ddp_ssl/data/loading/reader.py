"""The encoded images of coming batches, read ahead in threads; bad images are replaced.

Reading here and not in DALI has three uses: any number of threads hides the latency of a network
file system, files and shards are read alike, and every error names its file. Nearly all bad files
are found before DALI sees them. If DALI stops at another one, `TrainLoader` goes back and calls
`examine`.
"""

from __future__ import annotations

import errno
import io
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image

from ddp_ssl.data.datasets.remote import StoreError
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.decodable import (
    Bytes,
    Decoder,
    first_line,
    is_for_pil,
    rewritten,
    too_large,
    worth_trying,
)
from ddp_ssl.data.loading.order import Ids, Order
from ddp_ssl.data.loading.settings import LoaderSettings
from ddp_ssl.utils.seeds import hashed

logger = logging.getLogger("ddp_ssl")

Loaded = Bytes | str  # an encoded image, or the reason why there is none
Agree = Callable[[dict[int, str]], dict[int, str]]

DEPTH = 2  # batches read ahead of those that DALI has, or as many as give all threads an image
# These errors stay; any other may pass, as when a server is restarted.
FINAL = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}
OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # faults of this process, not of the image
RETRIES = (0.1, 1.0)  # seconds
ATTEMPTS = 100  # at finding a replacement


class UnreadableError(RuntimeError):
    """There is no batch: a bad image cannot be replaced. One line."""


class Reader:
    """The encoded images of a split by id, or the reason why one cannot be used.

    One thread calls `take`, which reads in many. `ids_of(step)` are the images of a batch.
    """

    def __init__(
        self,
        split: Split,
        ids_of: Callable[[int], Ids],
        settings: LoaderSettings,
        bad: BadImages,
    ) -> None:
        self.split, self.ids_of, self.bad = split, ids_of, bad
        self.problems = bad.of(split) if split.images is None else {}
        self._sound: set[int] = set()  # their markers are odd, but they decode
        self._for_pil: set[int] = set()  # PIL decodes them, and DALI does not
        self._threads, self._max_pixels = settings.read_threads, settings.max_pixels
        self._pool = ThreadPoolExecutor(self._threads, "ddp_ssl-read")
        self._asked: dict[int, list[Future[list[Loaded]]]] = {}
        self._decoder = Decoder(settings.device_id, settings.decoding)
        self._one_at_a_time = threading.Lock()

    def take(self, step: int) -> list[Loaded]:
        """The batch of `step`; reading of the next ones has begun."""
        self._asked = {s: parts for s, parts in self._asked.items() if s >= step}
        depth = max(DEPTH, -(-self._threads // max(1, len(self.ids_of(step)))))
        for ahead in range(step, step + depth + 1):
            if ahead not in self._asked:
                parts = np.array_split(self.ids_of(ahead), self._threads)
                self._asked[ahead] = [self._pool.submit(self.load, p) for p in parts if len(p)]
        parts_read = self._asked.pop(step)
        return [loaded for part in parts_read for loaded in part.result()]

    def load(self, ids: Iterable[int]) -> list[Loaded]:
        """Images `ids`, one after the other; any thread may call this."""
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
        if (large := too_large(encoded, self._max_pixels)) is not None:
            return large
        if i in self._for_pil or is_for_pil(encoded):
            return self._rewritten(encoded, i)
        if worth_trying(encoded) or i in self._sound:
            return encoded
        return self.usable(encoded, i)

    def usable(self, encoded: Bytes, i: int) -> Loaded:
        """Image `i` for DALI, or why it is bad; decodes it, which is slow."""
        with self._one_at_a_time:
            found = self._decoder.usable(encoded)
        if found is encoded:
            self._sound.add(i)
        elif not isinstance(found, str):
            self._count_for_pil(i)
        return found

    def _rewritten(self, encoded: Bytes, i: int) -> Loaded:
        found = rewritten(encoded)
        if not isinstance(found, str):
            self._count_for_pil(i)
        return found

    def _count_for_pil(self, i: int) -> None:
        """Say, at 1, 10, 100, ... images, how many PIL decodes."""
        with self._one_at_a_time:
            before = len(self._for_pil)
            self._for_pil.add(i)
            count = len(self._for_pil)
        if count > before and count in (1, 10, 100, 1_000, 10_000, 100_000):
            where = self.split.where(i)
            logger.info(
                "images that PIL decodes, one at a time and not DALI: %d, the last %s", count, where
            )

    def remember(self, found: dict[int, str]) -> None:
        """These images are bad from now on."""
        for i, reason in found.items():
            if i not in self.problems:
                self.bad.add(self.split, i, reason)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def examine(self, ids: Iterable[int]) -> bool:
        """Decode images; remember those that fail or that PIL must decode; whether any did.

        Raises `UnreadableError` if a store does not give one.
        """
        # Other threads read other images ahead, which say nothing about these.
        wanted, found = {int(i) for i in ids}, dict[int, str]()
        with self._one_at_a_time:
            known = wanted & self._for_pil
        for i in sorted(wanted):
            if i < 0 or i in self.problems:
                continue
            try:
                (loaded,) = self.load([i])
            except StoreError as error:
                raise UnreadableError(str(error)) from None
            result = loaded if isinstance(loaded, str) else self.usable(loaded, i)
            if isinstance(result, str):
                found[i] = result
        self.remember(found)
        with self._one_at_a_time:
            return bool(found) or known != wanted & self._for_pil


class TrainBatches:
    """Batches of a training order in which every bad image is replaced by another one.

    The replacement is a function of the seed, the step and the image, so every process that reads
    the image replaces it by the same one. `agree` makes a bad image of one process a bad image of
    all; each member of a view group calls it equally often. All other images keep their places.
    """

    def __init__(self, reader: Reader, order: Order, agree: Agree) -> None:
        self.reader, self.order, self.agree = reader, order, agree
        self._settled: dict[int, tuple[Ids, Ids]] = {}  # the ids of late steps, and tries at each
        self.failed: tuple[int, str] | None = None
        """The first step for which there is no batch, and why."""

    def batch(self, step: int) -> tuple[list[Bytes], Ids]:
        """Encoded images and their ids, int64 `[n]`.

        If no image can replace a bad one, or if a store does not give one, `failed` is set and the
        batch is padding. DALI asks for batches ahead of the run, so the run can still stop in
        order.
        """
        original = self.order.ids(step)
        loaded = self._read(step, lambda: self.reader.take(step), len(original))
        # After an error DALI asks for the same batches again. The earlier agreement holds, and
        # `agree` is not called: an image that only DALI rejects, it rejects on every process.
        again = step in self._settled
        if again:
            ids, tried = self._settled[step]
            for place in np.flatnonzero(ids != original):
                (loaded[place],) = self._load(step, ids[place])
        else:
            ids, tried = original.copy(), np.zeros(len(original), np.int64)
        while True:
            # An image may have become known as bad after its bytes were read.
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
                (loaded[place],) = self._load(step, ids[place])
                encoded = loaded[place]
                if not isinstance(encoded, str):
                    loaded[place] = self.reader.usable(encoded, int(ids[place]))
        self._settled = {s: x for s, x in self._settled.items() if s > step - 64}
        self._settled[step] = ids, tried
        return [x for x in loaded if not isinstance(x, str)], ids.copy()

    def _load(self, step: int, i: int) -> list[Loaded]:
        return self._read(step, lambda: self.reader.load([i]), 1)

    def _read(self, step: int, read: Callable[[], list[Loaded]], count: int) -> list[Loaded]:
        """What `read` gives; padding, and `failed` is set, if a store does not give it.

        No other image takes the place of one that a store should have.
        """
        if self.failed is None or step < self.failed[0]:
            try:
                return read()
            except StoreError as error:
                self.failed = step, str(error)
        return [PADDING] * count

    def mend(self, steps: Iterable[int]) -> bool:
        """Whether bad images among these batches explain that DALI stopped.

        They are replaced when DALI asks for the batches again.
        """
        ids = [int(i) for step in steps for i in self._settled.get(step, ((), ()))[0]]
        known = any(i in self.reader.problems for i in ids)  # found since, by another reader
        return self.reader.examine(ids) or known

    def _candidate(self, step: int, place: int, ids: Ids, tried: Ids) -> int:
        """The next image to try in a place; it depends on nothing that only this process knows."""
        original, batch = int(self.order.ids(step)[place]), self.order.global_ids(step)
        while True:
            tried[place] += 1
            key = (self.order.seed, "replacement", step, original, int(tried[place]))
            other = hashed(*key) % self.order.size
            # An image that is twice in a batch is its own negative. That is accepted only after
            # many attempts, as when the batch is nearly the whole data set.
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


class EvalBatches:
    """Batches of an evaluation, in which a bad image becomes padding: a black image with id -1."""

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
