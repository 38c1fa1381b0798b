"""Batches for training (endless, resumed bit-exactly) and for evaluation (each image once).

The loaders own the order of the images; DALI reads, decodes and augments them. DALI itself is
imported when a loader is made, its pipeline built when the first batch is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddp_ssl.data.augment import View
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.manifest import Split
from ddp_ssl.data.order import Ids, Order, hashed
from ddp_ssl.launch import cpu_share

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Batch", "EvalLoader", "TrainLoader"]

# What DALI decodes, by PIL's names. PIL opens more than that.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")


class TrainLoader:
    """This shard's part of every training batch, without end.

    `views` are the views made here and `view_ids` their indices among the run's views (default 0,
    1, ...). Loaders that differ in `salt` only give the same images in the same order with other
    augmentations. `mean` and `std` are for pixels in [0, 1]. `threads` 0 shares the cores.

    Raises `ValueError`, one line, if the batch does not fit the data or DALI is not installed.
    """

    step: int  # of the next batch
    _batches: Any  # DALI's iterator, None until the first batch
    _blob: bytes  # DALI's state to build that from, empty for none
    _broken: str  # why there are no more batches

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
        mean: Sequence[float],
        std: Sequence[float],
        threads: int,
        prefetch: int,
        device: torch.device,
        start_step: int = 0,
        view_ids: Sequence[int] | None = None,
    ) -> None:
        self._pipeline = _pipeline()
        self.split, self.views, self.device = split, list(views), device
        self.view_ids = list(range(len(views)) if view_ids is None else view_ids)
        assert len(self.view_ids) == len(self.views)
        self.order = Order(len(split), global_batch, shard, num_shards, seed)
        self.seed, self.salt, self.color_jitter = seed, salt, color_jitter
        self.mean, self.std = tuple(mean), tuple(std)
        self.threads, self.prefetch = threads, prefetch
        self._restart(start_step)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The batch of global step `self.step`; raises `RuntimeError` naming files that fail."""
        if self._broken:
            raise RuntimeError(self._broken)
        if self._batches is None:
            self._batches = self._build()
        try:
            (out,) = next(self._batches)
        except (RuntimeError, StopIteration) as error:
            # DALI goes on with another batch after an error, or never again: neither may be used.
            # (To replace bad images instead: change `_fetch`, rebuild from the last checkpoint.)
            ahead = range(self.step, self.step + self.prefetch + 2)
            self._broken = _explain(error, self.split, [self.order.ids(step) for step in ahead])
            raise RuntimeError(self._broken) from None
        self.step += 1
        return _batch(out, len(self.views), self.split, self.device)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on with the next batch; safe to load as weights only."""
        blob = self._blob if self._batches is None else self._batches.checkpoints()[0]
        return {
            "blob": torch.frombuffer(bytearray(blob or b"\0"), dtype=torch.uint8)[: len(blob)],
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
            return (
                f"the loader's state is of another set-up ({_changes(different, theirs, ours)}): "
                f"the order of the images continues exactly at step {step}, their augmentations "
                "are drawn anew"
            )
        self._restart(int(state["start"]))
        self.step, self._blob = step, state["blob"].cpu().numpy().tobytes()
        return None

    def fingerprint(self) -> dict[str, str]:
        """Everything that shapes the pipeline: DALI restores another one's blob silently wrong."""
        return {
            "dali": self._pipeline.VERSION,
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
            "normalisation": repr((self.mean, self.std)),
        }

    def _restart(self, step: int) -> None:
        """A pipeline whose first batch is that of `step`; its augmentation seed follows from it."""
        self.step = self.order.start = step
        self._batches = None
        self._blob = b""
        self._broken = ""

    def _build(self) -> Any:
        return self._pipeline.train_iterator(
            self._fetch,
            self.views,
            self.view_ids,
            files=self.split.images is None,
            color_jitter=self.color_jitter,
            mean=self.mean,
            std=self.std,
            seed=hashed(self.seed, self.salt, self.order.start, "augment"),
            batch_size=self.order.local_batch,
            threads=_threads(self.threads),
            prefetch=self.prefetch,
            device_id=_device_id(self.device),
            checkpoint=self._blob or None,
        )

    def _fetch(self, info: Any) -> tuple[Any, Ids]:
        return _fetch(self.split, self.order.ids(self.order.start + info.iteration))


class EvalLoader:
    """One central crop of each of `split[ids]`; shard r takes `ids[r::num_shards]`.

    All shards give the same number of batches of `batch_size` images: what is missing is filled up
    with an image whose id is -1. `val_size` None is not accepted; `val_resize` None is 8/7 of
    `val_size` from 64 px on, else `val_size`. Each iteration is a new pass.
    """

    def __init__(
        self,
        split: Split,
        ids: Ids,
        *,
        batch_size: int,
        shard: int,
        num_shards: int,
        val_resize: int | None,
        val_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        threads: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        self._pipeline = _pipeline()
        self.split, self.device, self.batch_size = split, device, batch_size
        self.size, self.resize = val_size, val_resize or default_resize(val_size)
        if self.resize < self.size:
            raise ValueError(
                f"data.val_resize: {self.resize} is less than the central crop of {self.size}; "
                f"accepted: {self.size} or more"
            )
        self.mean, self.std = tuple(mean), tuple(std)
        self.threads, self.prefetch = threads, prefetch
        own = np.asarray(ids, np.int64)[shard::num_shards]
        self._batches = math.ceil(math.ceil(len(ids) / num_shards) / batch_size)
        self._ids = np.full(self._batches * batch_size, -1)
        self._ids[: len(own)] = own
        self._filler = int(ids[0]) if len(ids) else -1

    def __len__(self) -> int:
        """Batches, the same on all shards."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._batches:
            return
        batches = self._pipeline.eval_iterator(
            self._fetch,
            files=self.split.images is None,
            resize=self.resize,
            size=self.size,
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            threads=_threads(self.threads),
            prefetch=self.prefetch,
            device_id=_device_id(self.device),
        )
        for step in range(self._batches):
            try:
                (out,) = next(batches)
            except (RuntimeError, StopIteration) as error:
                ahead = range(step, min(step + self.prefetch + 2, self._batches))
                ids = [self._read_at(at) for at in ahead]
                raise RuntimeError(_explain(error, self.split, ids)) from None
            yield _batch(out, 1, self.split, self.device)

    def _at(self, step: int) -> Ids:
        return self._ids[step * self.batch_size : (step + 1) * self.batch_size]

    def _read_at(self, step: int) -> Ids:
        ids = self._at(step)
        return np.where(ids < 0, self._filler, ids)

    def _fetch(self, info: Any) -> tuple[Any, Ids]:
        if info.iteration >= self._batches:
            raise StopIteration
        return _fetch(self.split, self._read_at(info.iteration))[0], self._at(info.iteration)[
            :, None
        ]


def default_resize(size: int) -> int:
    """The shorter side from which a central crop of `size` is taken: 256 for 224."""
    return round(size * 8 / 7) if size >= 64 else size


# --- parts ---------------------------------------------------------------------------------------


def _pipeline() -> ModuleType:
    """DALI's graphs; raises `ValueError` where DALI is not installed."""
    from ddp_ssl.data import pipeline

    return pipeline


def _fetch(split: Split, ids: Ids) -> tuple[Any, Ids]:
    """What DALI's source gives for a batch: paths or pixels, and ids `[n, 1]`."""
    if split.images is not None:
        return split.images[ids], ids[:, None]
    return [split.path(i) for i in ids], ids[:, None]


def _batch(out: dict[str, torch.Tensor], views: int, split: Split, device: torch.device) -> Batch:
    ids = out["ids"].flatten()
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


def _explain(error: Exception, split: Split, batches: list[Ids]) -> str:
    """One line for an error of DALI's, which seldom says the file: the files that fail a decode.

    An error can come up before the batch that it belongs to, so all batches in flight are tested.
    """
    bad = []
    if split.images is None:
        for i in dict.fromkeys(np.concatenate(batches).tolist()):
            path = os.fsdecode(split.path(i).tobytes())
            problem = _decode_problem(path)
            if problem:
                bad.append(f"{path} ({problem})")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        return f"images that cannot be read: {', '.join(bad[:5])}{more}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "fail" in line] or lines
    return f"DALI stopped: {telling[-1] if telling else type(error).__name__}"


def _decode_problem(path: str) -> str | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.format not in FORMATS:
                return f"{image.format} is not supported"
            image.load()
    except Exception as error:
        return "not an image" if "cannot identify" in str(error) else _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__
