"""Features of all images of a split; each process makes its share, or reads it from disk.

A process holds a contiguous part of the split, so that features on disk serve any number of
processes.
"""

import hashlib
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddp_ssl.comm import Comm
from ddp_ssl.config.views import View, views_of
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.loader import EvalLoader, PatchLoader
from ddp_ssl.data.loading.reader import Reader
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings
from ddp_ssl.evals.settings import EvaluateConfig
from ddp_ssl.utils.files import replaced
from ddp_ssl.utils.progress import Ticker, logger
from ddp_ssl.utils.sealed import CHECKSUM
from ddp_ssl.utils.seeds import hashed
from ddp_ssl.utils.text import one_line

Ids = npt.NDArray[np.int64]
Tell = Callable[[str], None]

KEPT = 3  # version of the files on disk and of their key
SAMPLED = 1000  # files of a split whose size and time are part of the key
CHUNKS = (128, 4096)  # fewest and most images that are augmented from one seed


@dataclass
class Block:
    """This process's part of a split: features `[m, d]` float32 on the CPU, labels and ids `[m]`.

    Ids are sorted, and those of rank r are all less than those of rank r + 1. Images without a
    label and images that cannot be read are left out.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, mask: Tensor) -> "Block":
        """The images of a boolean mask `[m]`."""
        return Block(self.features[mask], self.labels[mask], self.ids[mask])


def patch_view(settings: EvaluateConfig) -> View:
    """The augmentation of a patch: view 0 of `data.views`, at the size of the evaluation."""
    return replace(views_of(settings.data.views)[0], size=settings.image_size)


def crop_view(settings: EvaluateConfig) -> View:
    """A random crop and flip as in view 0 of `data.views`, without its changes of colour."""
    view = replace(patch_view(settings), function="")
    return replace(view, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)


class Extractor:
    """Makes features with a backbone `[n, 3, S, S] -> [n, d]`, in float32 and eval mode.

    `cache`: the folder for features on disk, or None; `digest`: hash of the weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        settings: EvaluateConfig,
        comm: Comm,
        device: torch.device,
        *,
        digest: str = "",
        cache: Path | None = None,
        bad: BadImages | None = None,
        tell: Tell = lambda line: None,
    ) -> None:
        self.backbone, self.width, self.settings = backbone.eval(), width, settings
        self.comm, self.device, self.tell = comm, device, tell
        self.digest, self.cache = digest, cache
        self.bad = BadImages() if bad is None else bad

    def features(self, split: Split, patches: int = 1, what: str = "images") -> Block:
        """This process's part of `split`, averaged over `patches` views.

        One view is a central crop, the others are random. The features are the same at any number
        of processes.
        """
        chunk = min(max(-(-len(split) // 64), CHUNKS[0]), CHUNKS[1])
        chunks = range(-(-len(split) // chunk))
        rank, size = self.comm.rank, self.comm.world_size  # each takes a contiguous part
        mine = chunks[rank * len(chunks) // size : (rank + 1) * len(chunks) // size]
        first, end = mine.start * chunk, min(mine.stop * chunk, len(split))
        home = self._home(split, patches)
        block = None if home is None else _kept(home, first, end)
        if block is not None and not self._still_bad(split, block, first, end):
            block = None
        if block is not None:
            self.tell(f"features of {len(split)} {what}: taken from {home}")
        else:
            block = self._make(split, patches, first, end, chunk, what)
            if home is not None and first < end:
                self._keep(home, first, end, block)
        labels = torch.from_numpy(split.labels[block.ids.numpy()])
        block = Block(block.features, labels, block.ids)
        return block if bool((labels >= 0).all()) else block.where(labels >= 0)

    def _make(
        self, split: Split, patches: int, first: int, end: int, chunk: int, what: str
    ) -> Block:
        ticker = Ticker(
            f"features of {what} (rank 0's share)", (end - first) * patches, self.comm.rank == 0
        )
        start, done = time.perf_counter(), 0
        sums = torch.zeros(end - first, self.width)
        counts = torch.zeros(end - first, dtype=torch.long)
        for views, ids in self._views(split, patches, first, end, chunk):
            real = ids >= 0
            at = ids[real] - first
            for view in views:
                sums[at] += self.embed(view).cpu()[real]
                counts[at] += 1
            done += len(views) * int(real.sum())
            ticker.at(done)
        seconds = time.perf_counter() - start
        views_text = "" if patches == 1 else f", {patches} patches each"
        self.tell(f"features of {len(split)} {what}{views_text}: {seconds:.1f} s")
        sums /= patches
        usable = counts == patches
        ids = usable.nonzero().flatten() + first
        return Block(sums if bool(usable.all()) else sums[usable], torch.zeros_like(ids), ids)

    def _views(
        self, split: Split, patches: int, first: int, end: int, chunk: int
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Views of images `[n, 3, S, S]` and ids `[n]`, -1 for padding."""
        if first == end:
            return
        data, size, bad = self.settings.data, self.settings.eval.batch_size, self.bad
        how = LoaderSettings.of(data, self.device)
        every = np.arange(first, end)
        for batch in EvalLoader(
            split, every, data.central_crop, how, batch_size=min(size, len(every)), bad=bad
        ):
            yield batch.views, batch.ids.cpu()
        patch = Augmentation([patch_view(self.settings)] * (patches - 1), data.color_jitter)
        for begin in range(first, end, chunk) if patches > 1 else ():
            # The draws depend on the chunk and not on the process that makes it.
            some = np.arange(begin, min(begin + chunk, end))
            seed = hashed(self.settings.run.seed, "patches", begin)
            for batch in PatchLoader(
                split, some, patch, how, seed=seed, batch_size=min(size, len(some)), bad=bad
            ):
                yield batch.views, batch.ids

    @torch.no_grad()
    def embed(self, view: Tensor) -> Tensor:
        """Images `[n, 3, S, S]` to features `[n, d]` float32 on the device."""
        view = view.to(self.device, torch.float32)
        if self.settings.model.channels_last:
            view = view.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.backbone(view)
        return out.flatten(1).float()

    # --- on disk ---------------------------------------------------------------------------------

    def _home(self, split: Split, patches: int) -> Path | None:
        """The folder of these features; None where they are too few to be written."""
        size = 4 * len(split) * self.width * patches
        if self.cache is None or size < self.settings.run.cache_mb * 2**20:
            return None
        data, side = self.settings.data, self.settings.image_size
        model = self.settings.model
        # The same weights give other features in another network.
        network = re.sub(r"0x[0-9a-f]+", "", repr(self.backbone))
        key: list[Any] = [KEPT, self.digest, model.backbone, sorted(model.backbone_args.items())]
        key += [model.stem, network, self.device.type, split.digest, _stamps(split), side]
        key += [data.central_crop.resize, data.normalisation, patches]
        if data.val_interpolation is not None:
            key.append(data.val_interpolation)
        if patches > 1:
            key += [patch_view(self.settings), data.color_jitter, self.settings.run.seed]
            key.append(self.settings.eval.batch_size)
        return self.cache / hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    def _still_bad(self, split: Split, block: Block, first: int, end: int) -> bool:
        """Whether the images that a part on disk lacks still cannot be read; adds them to `bad`."""
        lacking = np.setdiff1d(np.arange(first, end), block.ids.numpy())
        if not len(lacking):
            return True
        if split.images is not None:
            return False
        how = replace(LoaderSettings.of(self.settings.data, self.device), read_threads=1)
        reader = Reader(split, lambda step: lacking, how, self.bad)
        reader.examine(lacking)
        reader.close()
        return all(int(i) in reader.problems for i in lacking)

    def _keep(self, home: Path, first: int, end: int, block: Block) -> None:
        """Write a part; an error is only logged."""
        path = home / f"{first:09d}-{end:09d}.safetensors"
        try:
            home.mkdir(parents=True, exist_ok=True)
            content = {"features": block.features.contiguous(), "ids": block.ids}
            with replaced(path) as temporary:
                save_file(content, temporary, {CHECKSUM: _checksum(**content)})
        except (OSError, SafetensorError) as error:
            logger.warning("features are not kept: %s: %s", path, one_line(error))


def _kept(home: Path, first: int, end: int) -> Block | None:
    """Images `first` to `end` from the parts on disk; None if a part is missing."""
    parts: list[tuple[Tensor, Tensor]] = []
    reached = first
    for path in sorted(home.glob("*.safetensors")):
        found = re.fullmatch(r"(\d+)-(\d+)\.safetensors", path.name)
        if not found or not int(found[1]) <= reached < min(int(found[2]), end):
            continue
        try:
            with safe_open(path, "pt") as file:
                features, ids = (file.get_tensor(name) for name in ("features", "ids"))
                if (file.metadata() or {}).get(CHECKSUM) != _checksum(features, ids):
                    raise SafetensorError("its checksum differs")
                low, high = torch.searchsorted(ids, torch.tensor([reached, end])).tolist()
                parts.append((features[low:high], ids[low:high]))
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be read, made anew: %s", path, error)
            return None
        reached = min(int(found[2]), end)
    if reached < end or not parts:
        return None
    features, ids = (torch.cat(part) for part in zip(*parts, strict=True))
    return Block(features, torch.zeros_like(ids), ids)


def _checksum(features: Tensor, ids: Tensor) -> str:
    """CRC-32 of the content of a part."""
    value = zlib.crc32(repr((features.dtype, features.shape, ids.dtype)).encode())
    for tensor in (features, ids):
        value = zlib.crc32(tensor.numpy().data, value)
    return str(value)


def _stamps(split: Split) -> str:
    """Hash of the sizes and times of some of the files, evenly spaced; of shards, of their index.

    The split's own digest covers names and labels only: it stays the same if a file is replaced.
    """
    if split.images is not None:
        return ""
    some = np.unique(np.linspace(0, len(split) - 1, min(len(split), SAMPLED)).astype(np.int64))
    found: list[tuple[int, ...]] = []
    for i in some.tolist():
        if split.shards is not None:
            sums = split.shards.crc if split.shards.kind != "shards" else None
            offset, size = int(split.shards.offset[i]), int(split.shards.size[i])
            found.append((offset, size) if sums is None else (offset, size, int(sums[i])))
            continue
        try:
            stat = os.stat(split.path(i))
            found.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(())
    return hashlib.sha256(repr(found).encode()).hexdigest()


def some_of(ids: Ids, at_most: int, chooser: np.random.Generator) -> Ids:
    """Sorted ids: all of them, or a random subset."""
    return ids if len(ids) <= at_most else np.sort(chooser.choice(ids, at_most, replace=False))


def gather_rows(x: Tensor, comm: Comm, device: torch.device) -> Tensor:
    """Rows `[m_r, ...]` of all processes, `[sum m_r, ...]` in rank order, on the CPU."""
    if comm.world_size == 1:
        return x
    counts = comm.gather(torch.tensor([[len(x)]], device=device))[0].tolist()
    if not any(counts):  # nothing can be gathered from tensors without elements
        return x.cpu()
    padded = torch.zeros((1, max(counts), *x.shape[1:]), dtype=x.dtype, device=device)
    padded[0, : len(x)] = x.to(device)
    rows = comm.gather(padded)[0].view(comm.world_size, *padded.shape[1:]).cpu()
    return torch.cat([rows[rank, :count] for rank, count in enumerate(counts)])
