"""Batches for training (endless, resumed bit-exactly) and for evaluation (each image once).

The loaders own the order of the images and read them (`source.py`); DALI decodes and augments (on a
CPU `small.py` augments small images held in memory, and DALI only keeps the batches ready). An
image that cannot be used costs nothing but itself: another takes its place, all others are what
they would have been. DALI itself is imported when a loader is made, its pipeline built when the
first batch is asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddp_ssl.data import small
from ddp_ssl.data.augment import CentralCrop, Decoding, PixelFormat, View
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.manifest import Split
from ddp_ssl.data.order import Ids, Order, hashed
from ddp_ssl.data.source import (
    Agree,
    BadImages,
    EvalSource,
    Reader,
    TrainSource,
    UnreadableError,
)
from ddp_ssl.data.verify import telling
from ddp_ssl.launch import cpu_share

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Batch", "EvalLoader", "TrainLoader"]


class TrainLoader:
    """This shard's part of every training batch, without end.

    `views` are the views made here and `view_ids` their indices among the run's views (default 0,
    1, ...). Loaders that differ in `salt` only give the same images in the same order with other
    augmentations. `threads` 0 shares the cores. What cannot be used is added to `bad`; `agree`
    turns this process's bad images of a batch into those of all that read the same images.

    Raises `ValueError`, one line, if the batch does not fit the data or DALI is not installed.
    """

    step: int  # of the next batch
    _batches: Any  # DALI's iterator, None until the first batch
    _blob: bytes  # DALI's state after the last batch, empty before the first
    _broken: RuntimeError | None  # why there are no more batches

    def __init__(
        self,
        split: Split,
        views: Sequence[View],
        *,
        global_batch: int,
        shard: int,
        num_shards: int,
        seed: int,
        salt: int,
        color_jitter: str,
        form: PixelFormat,
        threads: int,
        prefetch: int,
        device: torch.device,
        decoding: Decoding = Decoding(),  # noqa: B008 (a tuple)
        read_threads: int = 16,
        start_step: int = 0,
        view_ids: Sequence[int] | None = None,
        bad: BadImages | None = None,
        agree: Agree = dict,
    ) -> None:
        self._pipeline = _pipeline()
        self.split, self.views, self.device = split, list(views), device
        self.view_ids = list(range(len(views)) if view_ids is None else view_ids)
        assert len(self.view_ids) == len(self.views)
        self.order = Order(len(split), global_batch, shard, num_shards, seed)
        self.seed, self.salt, self.color_jitter = seed, salt, color_jitter
        self.form, self.decoding = form, decoding
        self._small = small.suits(split.images, self.views, color_jitter, device)
        self.threads, self.prefetch = threads, prefetch
        reader = Reader(
            split, self.order.ids, threads=read_threads, device_id=_device_id(device),
            decoding=decoding, bad=BadImages() if bad is None else bad,
        )  # fmt: skip
        self._source = TrainSource(reader, self.order, agree)
        self._restart(start_step)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The batch of global step `self.step`.

        Raises `UnreadableError`, one line, if there is none because of bad images, `RuntimeError`
        if DALI stops for another reason.
        """
        if self._source.failed is not None and self.step >= self._source.failed[0]:
            raise UnreadableError(self._source.failed[1])
        if self._broken:
            raise type(self._broken)(str(self._broken))
        while True:
            if self._batches is None:
                self._batches = self._build()
            try:
                (out,) = next(self._batches)
                break
            except (RuntimeError, StopIteration) as error:
                self._batches = None  # DALI goes on with another batch, or never again
                if not self._mended():
                    self._broken = self._error(error)
                    raise self._broken from None
        self._blob = self._batches.checkpoints()[0]
        self.step += 1
        return _batch(out, len(self.views), self.split, self.device)

    def _mended(self) -> bool:
        """Whether bad images explain the error: they will be replaced, from the last state on.

        An error can come up before the batch that it belongs to: all batches in flight are tested.
        """
        ahead = range(self.step, self.step + self.prefetch + 2)
        return self.split.images is None and self._source.mend(ahead)

    def _error(self, error: Exception) -> RuntimeError:
        return RuntimeError(telling(error))

    @property
    def failing(self) -> str | None:
        """Why there will soon be no batch, known some steps before `next` raises; or None."""
        return None if self._source.failed is None else self._source.failed[1]

    def close(self) -> None:
        """Let go of DALI's pipeline and of the threads."""
        self._batches = None
        self._source.reader.close()

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on with the next batch; safe to load as weights only."""
        blob = torch.frombuffer(bytearray(self._blob or b"\0"), dtype=torch.uint8)
        return {
            "blob": blob[: len(self._blob)],
            "step": self.step,
            "start": self.order.start,
            "fingerprint": self.fingerprint(),
        }

    def load_state(self, state: dict[str, Any], step: int) -> str | None:
        """Go on at global `step`, from what `state` gave there; None if that is bit-exact.

        Otherwise (another number of shards, say) the order of the images still continues exactly
        at `step`, augmentations are drawn from a new seed, and the returned line says what differs.
        """
        theirs, ours = state.get("fingerprint", {}), self.fingerprint()
        theirs, ours = theirs | {"step": str(state.get("step"))}, ours | {"step": str(step)}
        different = [key for key in ours if ours[key] != theirs.get(key)]
        if different:
            self._restart(step)
            what = _changes(different, theirs, ours)
            return f"the loader's state is of another set-up ({what}): {self._anew(step)}"
        self._restart(int(state["start"]))
        self.step, self._blob = step, state["blob"].cpu().numpy().tobytes()
        return None

    def _anew(self, step: int) -> str:
        return (
            f"the order of the images continues exactly at step {step}, their augmentations are "
            "drawn anew"
        )

    def fingerprint(self) -> dict[str, str]:
        """Everything that shapes the pipeline: DALI restores another one's blob silently wrong."""
        return {
            "dali": self._pipeline.VERSION,
            "graph": small.VERSION if self._small else str(self._pipeline.GRAPH),
            "device": self.device.type,
            "data": self.split.digest,
            "views": repr(self.views),
            "view_ids": repr(self.view_ids),
            "batch": str(self.order.local_batch),
            "shard": str(self.order.shard),
            "num_shards": str(self.order.num_shards),
            "seed": str(self.seed),
            "salt": str(self.salt),
            "color_jitter": self.color_jitter,
            "normalisation": repr(tuple(self.form)),
        } | ({"decoding": repr(self.decoding.hw_load)} if self.device.type == "cuda" else {})

    def _restart(self, step: int) -> None:
        """A pipeline whose first batch is that of `step`; its augmentation seed follows from it."""
        self.step = self.order.start = step
        self._batches = None
        self._blob = b""
        self._broken = None

    def _build(self) -> Any:
        if self._small:
            return self._pipeline.passing_iterator(
                self._augmented,
                len(self.views),
                half=self.form.half,
                batch_size=self.order.local_batch,
                prefetch=self.prefetch,
                checkpoint=self._blob or None,
            )
        return self._iterator(self._pipeline.read, self._fetch, self.split.images is None)

    def _iterator(self, reading: Any, *reading_args: Any) -> Any:
        return self._pipeline.train_iterator(
            functools.partial(reading, *reading_args, self.decoding),
            self.views,
            self.view_ids,
            color_jitter=self.color_jitter,
            form=self.form,
            seed=self._augment_seed,
            batch_size=self.order.local_batch,
            threads=_threads(self.threads),
            prefetch=self.prefetch,
            device_id=_device_id(self.device),
            checkpoint=self._blob or None,
        )

    @property
    def _augment_seed(self) -> int:
        return hashed(self.seed, self.salt, self.order.start, "augment")

    def _augmented(self, info: Any) -> tuple[Any, ...]:
        """The views of a batch of small images, float `[n, S, S, 3]`, and its ids `[n, 1]`."""
        pixels, ids = self._fetch(info)
        seed, step = self._augment_seed, self.order.start + info.iteration
        views = [
            small.augment(pixels, view, self.color_jitter, self.form, (seed, view_id, step))
            for view, view_id in zip(self.views, self.view_ids, strict=True)
        ]
        return (*(view.numpy() for view in views), ids)

    def _fetch(self, info: Any) -> tuple[Any, Ids]:
        step = self.order.start + info.iteration
        if self.split.images is not None:
            ids = self.order.ids(step)
            return self.split.images[ids], ids[:, None]
        images, ids = self._source.batch(step)
        return images, ids[:, None]


class StreamLoader(TrainLoader):
    """Training batches from tar shards read in sequence by DALI, from files or `s3://`.

    Shuffled when packed, by the start of each pass and by a buffer of `shuffle` images, each data
    shard its own share: not the order that the other loader keeps at any number of processes, and
    a bad image ends the run. With the same number of processes a resumed run goes on exactly.
    `paths` are the tar files and `indices` DALI's index of each.
    """

    def __init__(
        self,
        split: Split,
        views: Sequence[View],
        *,
        paths: Sequence[str],
        indices: Sequence[str],
        shuffle: int = 4096,
        **settings: Any,
    ) -> None:
        self.paths, self.indices, self.shuffle = list(paths), list(indices), shuffle
        super().__init__(split, views, **settings)

    def _build(self) -> Any:
        return self._iterator(
            self._pipeline.stream,
            self.paths,
            self.indices,
            self.order.shard,
            self.order.num_shards,
            self.shuffle,
            hashed(self.seed, self.order.start, "stream"),  # the same in a view group
        )

    def _mended(self) -> bool:
        return False

    def _error(self, error: Exception) -> RuntimeError:
        return UnreadableError(
            f"{telling(error)}; a streamed run cannot replace a bad image: ddp-ssl check-data "
            "finds it, data.skip leaves it out of new shards, data.reader=indexed replaces it"
        )

    def _anew(self, step: int) -> str:
        return (
            f"the stream starts anew at step {step}; of the interrupted epoch some images come "
            "twice and others not at all"
        )

    def fingerprint(self) -> dict[str, str]:
        """Also what shapes the stream."""
        names = [path.rpartition("/")[2] for path in self.paths]
        return super().fingerprint() | {"shards": repr(names), "shuffle": str(self.shuffle)}


class EvalLoader:
    """One central crop of each of `split[ids]`; shard r takes `ids[r::num_shards]`.

    All shards give the same number of batches of `batch_size` images. What is missing is filled up
    with some image whose id is -1, and so is an image that cannot be used, which is added to `bad`.
    Each iteration is a new pass.
    """

    def __init__(
        self,
        split: Split,
        ids: Ids,
        *,
        batch_size: int,
        shard: int,
        num_shards: int,
        crop: CentralCrop,
        form: PixelFormat,
        threads: int,
        prefetch: int,
        device: torch.device,
        decoding: Decoding = Decoding(),  # noqa: B008 (a tuple)
        read_threads: int = 16,
        bad: BadImages | None = None,
    ) -> None:
        self._pipeline = _pipeline()
        self.split, self.device, self.batch_size = split, device, batch_size
        self.crop = crop
        if crop.resize < crop.size:
            raise ValueError(
                f"data.val_resize: {crop.resize} is less than the central crop of {crop.size}; "
                f"accepted: {crop.size} or more"
            )
        self.form, self.decoding = form, decoding
        self.threads, self.prefetch, self.read_threads = threads, prefetch, read_threads
        self.bad = BadImages() if bad is None else bad
        own = np.asarray(ids, np.int64)[shard::num_shards]
        self._batches = math.ceil(math.ceil(len(ids) / num_shards) / batch_size)
        self._ids = np.full(self._batches * batch_size, -1)
        self._ids[: len(own)] = own

    def __len__(self) -> int:
        """Batches, the same on all shards."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        reader = Reader(
            self.split, self._at, threads=self.read_threads, device_id=_device_id(self.device),
            decoding=self.decoding, bad=self.bad,
        )  # fmt: skip
        source, batches = EvalSource(reader), None
        for step in range(self._batches):
            while True:
                if batches is None:
                    batches = self._build(source, step)
                try:
                    (out,) = next(batches)
                    break
                except (RuntimeError, StopIteration) as error:
                    batches = None
                    ids = self._ids[step * self.batch_size :][
                        : (self.prefetch + 2) * self.batch_size
                    ]
                    if self.split.images is not None or not reader.examine(ids):
                        raise RuntimeError(telling(error)) from None
            yield _batch(out, 1, self.split, self.device)
        reader.close()

    def _build(self, source: EvalSource, first: int) -> Any:
        """The batches from `first` on."""
        return self._pipeline.eval_iterator(
            functools.partial(
                self._pipeline.read,
                lambda info: self._fetch(source, first + info.iteration),
                self.split.images is None,
                self.decoding,
            ),
            crop=self.crop,
            form=self.form,
            batch_size=self.batch_size,
            threads=_threads(self.threads),
            prefetch=self.prefetch,
            device_id=_device_id(self.device),
        )

    def _at(self, step: int) -> Ids:
        return self._ids[step * self.batch_size : (step + 1) * self.batch_size]

    def _fetch(self, source: EvalSource, step: int) -> tuple[Any, Ids]:
        if step >= self._batches:
            raise StopIteration
        if self.split.images is not None:
            ids = self._at(step)
            return self.split.images[np.maximum(ids, 0)], ids[:, None]
        images, ids = source.batch(step)
        return images, ids[:, None]


# --- parts ---------------------------------------------------------------------------------------


def _pipeline() -> ModuleType:
    """DALI's graphs; raises `ValueError` where DALI is not installed."""
    from ddp_ssl.data import pipeline

    return pipeline


def _batch(out: dict[str, torch.Tensor], views: int, split: Split, device: torch.device) -> Batch:
    ids = out["ids"]
    if ids.dtype == torch.uint8:  # a shard's member: digits, filled up with zeros
        numbers = [int(row.tobytes().rstrip(b"\0")) for row in ids.numpy()]
        ids = torch.tensor(numbers)
    ids = ids.flatten()
    own = ids.numpy()
    labels = torch.from_numpy(np.where(own < 0, -1, split.labels[own]))
    return Batch(
        [out[f"view{i}"].permute(0, 3, 1, 2) for i in range(views)],
        ids,
        labels.to(device, non_blocking=True),
    )


def _threads(threads: int) -> int:
    """0 is this process's share of the cores that it may use."""
    return threads or cpu_share()


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _changes(keys: list[str], old: dict[str, str], new: dict[str, str]) -> str:
    """`num_shards 2 -> 3, views`: values only where they are short."""
    texts = []
    for key in keys:
        before, after = old.get(key, "none"), new[key]
        short = len(before) + len(after) < 24
        texts.append(f"{key} {before} -> {after}" if short else key)
    return ", ".join(texts)
