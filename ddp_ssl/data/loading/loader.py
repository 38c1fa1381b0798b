"""Batches for training (endless, resumed bit-exactly) and for evaluation (each image once).

The loaders own the order of the images and read them (`reader.py`); DALI decodes and augments. On a
CPU, `small_images.py` augments small images held in memory, and DALI only keeps the batches ready.
An image that cannot be used is replaced by another; all others stay as they would have been. DALI
is imported when a loader is made, and its pipeline is built for the first batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddp_ssl.config.views import CentralCrop
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.datasets.remote import StoreError
from ddp_ssl.data.datasets.split import Split, not_compared
from ddp_ssl.data.loading import recipes, small_images
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.decodable import dali_message
from ddp_ssl.data.loading.order import Ids, Order
from ddp_ssl.data.loading.reader import Agree, EvalBatches, Reader, TrainBatches, UnreadableError
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings
from ddp_ssl.utils.seeds import hashed

if TYPE_CHECKING:
    from types import ModuleType


class TrainLoader:
    """This shard's part of every training batch, without end.

    `order` is that of `split`. Images that cannot be used are added to `bad`. `agree` turns this
    process's bad images of a batch into those of all processes that read the same images.

    Raises `ValueError`, one line, if DALI is not installed.
    """

    step: int  # of the next batch
    _start: int  # the step of the pipeline's first batch
    _batches: Any  # DALI's iterator, None until the first batch
    _blob: bytes  # DALI's state after the last batch, empty before the first
    _broken: RuntimeError | None  # why there are no more batches

    def __init__(
        self,
        split: Split,
        order: Order,
        augmentation: Augmentation,
        settings: LoaderSettings,
        *,
        bad: BadImages | None = None,
        agree: Agree = dict,
    ) -> None:
        assert order.size == len(split)
        self._dali = _dali()
        settings = settings.of_split(split)
        self.split, self.order, self.settings = split, order, settings
        self.augmentation, self.views = augmentation, list(augmentation.views)
        self._small = small_images.suits(
            split.images, self.views, augmentation.color_jitter, settings.device
        )
        self._recipes = {v.function: recipes.digest(v.function) for v in self.views if v.function}
        for view in {view.function: view for view in self.views if view.function}.values():
            self._dali.try_recipe(view, settings, split.dtype.name)
        reader = Reader(split, order.ids, settings, BadImages() if bad is None else bad)
        self._source = TrainBatches(reader, order, agree)
        self._restart(0)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The batch of global step `self.step`.

        Raises `UnreadableError`, one line, if bad images leave no batch, and `RuntimeError` if DALI
        stops for another reason.
        """
        if self._broken:
            raise type(self._broken)(str(self._broken))
        while True:
            if self._source.failed is not None and self.step >= self._source.failed[0]:
                raise UnreadableError(self._source.failed[1])
            if self._batches is None:
                self._batches = self._build()
            try:
                (out,) = next(self._batches)
                break
            except (RuntimeError, StopIteration) as error:
                self._batches = None  # after an error DALI skips a batch, or stops for good
                if not self._mended():
                    self._broken = RuntimeError(dali_message(error))
                    raise self._broken from None
        self._blob = self._batches.checkpoints()[0]
        self.step += 1
        return _batch(out, len(self.views), self.split, self.settings.device)

    def _mended(self) -> bool:
        """Whether bad images explain the error: they will be replaced, from the last state on.

        An error can come up before the batch that it belongs to, so all batches in flight are
        tested.
        """
        ahead = range(self.step, self.step + self.settings.prefetch + 2)
        return self.split.images is None and self._source.mend(ahead)

    @property
    def failing(self) -> str | None:
        """Why there will soon be no batch, known some steps before `next` raises; or None."""
        return None if self._source.failed is None else self._source.failed[1]

    def close(self) -> None:
        """Free DALI's pipeline, its memory on a GPU, and the threads."""
        self._batches = None
        self._source.reader.close()
        if self.settings.device.type == "cuda":
            self._dali.release()

    def state(self) -> dict[str, Any]:
        """The state for `load_state`; it can be loaded with `weights_only`."""
        blob = torch.frombuffer(bytearray(self._blob or b"\0"), dtype=torch.uint8)
        return {
            "blob": blob[: len(self._blob)],
            "step": self.step,
            "start": self._start,
            "fingerprint": self.fingerprint(),
        }

    def load_state(self, state: dict[str, Any], step: int) -> str | None:
        """Go on at global `step` from the `state` taken there; None if that is bit-exact.

        If the set-up differs (another number of shards, say), the order of the images still
        continues exactly at `step`. Augmentations are then drawn from a new seed, and the returned
        line names the differences.
        """
        theirs, ours = state.get("fingerprint", {}), self.fingerprint()
        theirs, ours = theirs | {"step": str(state.get("step"))}, ours | {"step": str(step)}
        out = not_compared("data", "labels", theirs, ours)
        different = [key for key in ours if ours[key] != theirs.get(key) and key != out]
        if different:
            self._restart(step)
            changes = _changes(different, theirs, ours)
            return (
                f"the loader's state is of another set-up ({changes}): the order of the images "
                f"continues exactly at step {step}, their augmentations are drawn anew"
            )
        self._restart(int(state["start"]))
        self.step, self._blob = step, state["blob"].cpu().numpy().tobytes()
        return None

    def fingerprint(self) -> dict[str, str]:
        """Everything that shapes the pipeline: DALI restores another one's blob silently wrong."""
        order, device = self.order, self.settings.device
        images, labels = self.split.identity
        return {
            "dali": self._dali.VERSION,
            "graph": small_images.VERSION if self._small else str(self._dali.GRAPH),
            "device": device.type,
            "data": images,
            "labels": labels,
            "views": repr(self.views),
            "view_ids": repr([view_id for view_id, _ in self.augmentation.keyed]),
            "batch": str(order.local_batch),
            "shard": str(order.shard),
            "num_shards": str(order.num_shards),
            "seed": str(order.seed),
            "salt": str(self.augmentation.salt),
            "color_jitter": self.augmentation.color_jitter,
            "normalisation": repr(self.settings.form[:3]),
            **({"decoding": repr(self.settings.decoding.hw_load)} if device.type == "cuda" else {}),
            **({"recipes": repr(self._recipes)} if self._recipes else {}),
        }

    def _restart(self, step: int) -> None:
        """A pipeline whose first batch is that of `step`; its augmentation seed follows from it."""
        self.step = self._start = step
        self._batches = None
        self._blob = b""
        self._broken = None

    def _build(self) -> Any:
        kept = {"batch_size": self.order.local_batch, "checkpoint": self._blob or None}
        if self._small:
            return self._dali.passing_iterator(
                self._augmented, len(self.views), self.settings, **kept
            )
        reading = functools.partial(
            self._dali.read,
            self._fetch,
            self.split.images is None,
            self.settings.decoding,
            self.split.dtype.name,
        )
        return self._dali.train_iterator(
            reading, self.augmentation, self.settings, seed=self._augment_seed, **kept
        )

    @property
    def _augment_seed(self) -> int:
        return hashed(self.order.seed, self.augmentation.salt, self._start, "augment")

    def _augmented(self, info: Any) -> tuple[Any, ...]:
        """The views of a batch of small images, float `[n, S, S, 3]`, and its ids `[n, 1]`."""
        pixels, ids = self._fetch(info)
        seed, step = self._augment_seed, self._start + info.iteration
        jitter, form = self.augmentation.color_jitter, self.settings.form
        views = [
            small_images.augment(pixels, view, jitter, form, (seed, view_id, step))
            for view_id, view in self.augmentation.keyed
        ]
        return (*(view.numpy() for view in views), ids)

    def _fetch(self, info: Any) -> tuple[Any, Ids]:
        step = self._start + info.iteration
        if self.split.images is not None:
            ids = self.order.ids(step)
            return self.split.pixels(ids), ids[:, None]
        images, ids = self._source.batch(step)
        return images, ids[:, None]


class _OnePass:
    """Each of `split[ids]` once; shard r takes `ids[r::num_shards]`.

    All shards give the same number of batches of `batch_size` images. Missing images are filled up
    with padding, which has the id -1. An image that cannot be used becomes padding too and is added
    to `bad`. Each iteration is a new pass.
    """

    views: int
    """Views of an image."""

    def __init__(
        self,
        split: Split,
        ids: Ids,
        settings: LoaderSettings,
        *,
        batch_size: int,
        shard: int = 0,
        num_shards: int = 1,
        bad: BadImages | None = None,
    ) -> None:
        self._dali = _dali()
        self.split, self.settings = split, settings.of_split(split)
        self.batch_size = batch_size
        self.bad = BadImages() if bad is None else bad
        own = np.asarray(ids, np.int64)[shard::num_shards]
        self._batches = math.ceil(math.ceil(len(ids) / num_shards) / batch_size)
        self._ids = np.full(self._batches * batch_size, -1)
        self._ids[: len(own)] = own

    def __len__(self) -> int:
        """Batches, the same on all shards."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        reader = Reader(self.split, self._at, self.settings, self.bad)
        source, batches, out = EvalBatches(reader), None, None
        try:
            for step in range(self._batches):
                while True:
                    if batches is None:
                        batches = self._iterator(self._reading(source, step))
                    try:
                        (out,) = next(batches)
                        break
                    except (RuntimeError, StopIteration) as error:
                        batches = None
                        ids = self._at(step, self.settings.prefetch + 2)
                        if self.split.images is not None or not reader.examine(ids):
                            raise RuntimeError(dali_message(error)) from None
                    except StoreError as error:  # of this process alone
                        raise UnreadableError(str(error)) from None
                yield _batch(out, self.views, self.split, self.settings.device)
        finally:
            batches = out = None
            reader.close()
            if self.settings.device.type == "cuda":
                self._dali.release()

    def _iterator(self, reading: Any) -> Any:
        """DALI's iterator over `reading`."""
        raise NotImplementedError

    def _reading(self, source: EvalBatches, first: int) -> Any:
        """The part of the graph that gives images and ids, from batch `first` on."""
        # A partial: DALI would rewrite a function of this project, and the functions it calls.
        return functools.partial(
            self._dali.read,
            lambda info: self._fetch(source, first + info.iteration),
            self.split.images is None,
            self.settings.decoding,
            self.split.dtype.name,
        )

    def _at(self, step: int, count: int = 1) -> Ids:
        return self._ids[step * self.batch_size : (step + count) * self.batch_size]

    def _fetch(self, source: EvalBatches, step: int) -> tuple[Any, Ids]:
        if step >= self._batches:
            raise StopIteration
        if self.split.images is not None:
            ids = self._at(step)
            return self.split.pixels(np.maximum(ids, 0)), ids[:, None]
        images, ids = source.batch(step)
        return images, ids[:, None]


class EvalLoader(_OnePass):
    """One central crop of each image. Raises `ValueError` (key `data.val_resize`) if none fits."""

    views = 1

    def __init__(
        self, split: Split, ids: Ids, crop: CentralCrop, settings: LoaderSettings, **share: Any
    ) -> None:
        super().__init__(split, ids, settings, **share)
        if crop.resize < crop.size:
            raise ValueError(
                f"data.val_resize: {crop.resize} is less than the central crop of {crop.size}; "
                f"accepted: {crop.size} or more"
            )
        self.crop = crop

    def _iterator(self, reading: Any) -> Any:
        return self._dali.eval_iterator(
            reading, self.crop, self.settings, batch_size=self.batch_size
        )


class PatchLoader(_OnePass):
    """Random views of each image, drawn from `seed`."""

    def __init__(
        self,
        split: Split,
        ids: Ids,
        augmentation: Augmentation,
        settings: LoaderSettings,
        *,
        seed: int,
        **share: Any,
    ) -> None:
        super().__init__(split, ids, settings, **share)
        self.augmentation, self.seed, self.views = augmentation, seed, len(augmentation.views)

    def _iterator(self, reading: Any) -> Any:
        return self._dali.train_iterator(
            reading, self.augmentation, self.settings, seed=self.seed, batch_size=self.batch_size
        )


# --- parts ---------------------------------------------------------------------------------------


def _dali() -> ModuleType:
    """DALI's graphs; raises `ValueError` where DALI is not installed."""
    from ddp_ssl.data.loading import dali

    return dali


def _batch(out: dict[str, torch.Tensor], views: int, split: Split, device: torch.device) -> Batch:
    ids = out["ids"].flatten()
    own = ids.numpy()
    labels = torch.from_numpy(np.where(own < 0, -1, split.labels[own]))
    if device.type == "cuda":  # a copy to the GPU makes the host wait only for other memory
        ids, labels = ids.pin_memory(), labels.pin_memory()
    return Batch(
        [out[f"view{i}"].permute(0, 3, 1, 2) for i in range(views)],
        ids,
        labels.to(device, non_blocking=True),
    )


def _changes(keys: list[str], old: dict[str, str], new: dict[str, str]) -> str:
    """`num_shards 2 -> 3, views`: values only where they are short."""
    texts = []
    for key in keys:
        before, after = old.get(key, "none"), new[key]
        short = len(before) + len(after) < 24
        texts.append(f"{key} {before} -> {after}" if short else key)
    return ", ".join(texts)
