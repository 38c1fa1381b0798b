"""Features of a data set as NPZ, and for TensorBoard's embedding projector.

docs/export.md says what is in the files.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl import distributed
from ddp_ssl.config import ConfigError
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import World
from ddp_ssl.distributed.agreement import on_all_ranks
from ddp_ssl.evals.features import Block, Extractor, gather_rows, some_of, teller
from ddp_ssl.evals.pretrained import Pretrained, prepare
from ddp_ssl.evals.settings import EvaluateConfig
from ddp_ssl.evals.weights import Source
from ddp_ssl.run import environment
from ddp_ssl.utils.files import replaced
from ddp_ssl.utils.progress import logger
from ddp_ssl.utils.text import one_line

Array = npt.NDArray[Any]

THUMBNAIL = 32  # pixels; a projector's sprite has 8192 x 8192 at most
MOST_POINTS = (8192 // THUMBNAIL) ** 2
CHUNK = 8192  # rows of each process that are gathered at a time


@dataclass(frozen=True)
class Wanted:
    """Options of the command line besides the settings."""

    split: str
    embeddings: bool
    out: Path | None
    projector: Path | None
    points: int


def embed(source: Source, settings: EvaluateConfig, wanted: Wanted, world: World) -> None:
    """Extract on all processes, write on rank 0. Raises `ConfigError`."""
    pretrained, settings, data = prepare(
        source, settings, world, lambda found: Network(found, wanted.embeddings)
    )
    network = Network(pretrained, wanted.embeddings)
    split = on_all_ranks(world, lambda: _split(data, wanted.split))
    on_all_ranks(world, lambda: _make_room(wanted) if world.is_main else None)

    comm = distributed.comm_of(world)
    widths = network.widths(settings.image_size)
    network.to(world.device)
    extractor = Extractor(network, sum(widths), settings, comm, world.device, tell=teller(world))
    features, ids = _all(extractor, split, f"{wanted.split} images of {data.name}", world)
    if not len(ids):
        raise ConfigError(f"data.name: none of the {len(split)} {wanted.split} images can be read")
    parts = dict(zip(("r", "z"), np.split(features, np.cumsum(widths)[:-1], 1), strict=False))
    about = _about(pretrained, settings, data, wanted.split, split)

    def write() -> None:
        if world.is_main and wanted.out is not None:
            write_npz(wanted.out, parts, split.labels[ids], ids, data.class_names, about)
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in parts.items())
            print(f"{wanted.out}: {shapes}, labels, ids, class_names")

    on_all_ranks(world, write)
    if wanted.projector is not None:
        project(wanted.projector, wanted.points, parts, ids, data, split, settings, world)


def project(
    folder: Path,
    points: int,
    parts: dict[str, Array],
    ids: Array,
    data: Dataset,
    split: Split,
    settings: EvaluateConfig,
    world: World,
) -> None:
    """Make thumbnails on all processes; write the projector's files on rank 0."""
    shown = some_of(ids, points, np.random.default_rng(settings.run.seed))
    extractor = Extractor(
        Thumbnails(settings).to(world.device),
        3 * THUMBNAIL**2,
        settings,
        distributed.comm_of(world),
        world.device,
    )
    pictures, at = _all(extractor, split.subset(shown), "thumbnails", world)
    shown = shown[at]

    def write() -> None:
        if not world.is_main:
            return
        rows, names = np.searchsorted(ids, shown), dict(enumerate(data.class_names))
        write_projector(
            folder,
            {name: x[rows] for name, x in parts.items()},
            [names.get(label, "unlabelled") for label in split.labels[shown].tolist()],
            shown,
            torch.from_numpy(pictures).view(-1, 3, THUMBNAIL, THUMBNAIL),
        )
        print(
            f"{folder}: {len(shown)} of {len(ids)} images; tensorboard --logdir {folder}, then "
            "Projector"
        )

    on_all_ranks(world, write)


def _all(extractor: Extractor, split: Split, what: str, world: World) -> tuple[Array, Array]:
    """Features `[m, d]`, on rank 0, and ids `[m]` of the images that can be read, in their order.

    Includes images without a label. Rows are gathered in chunks, so that only rank 0's host memory
    holds all of them.
    """
    # The extractor leaves out what has no label; here every image has one.
    alike = replace(split, labels=np.zeros_like(split.labels))
    block: Block = on_all_ranks(world, lambda: extractor.features(alike, what=what))
    comm, device = extractor.comm, world.device
    ids = gather_rows(block.ids, comm, device).sort().values.numpy()
    features = np.empty((len(ids) if world.is_main else 0, extractor.width), np.float32)
    most = int(comm.gather(torch.tensor([[len(block)]], device=device)).max())
    for start in range(0, most, CHUNK):
        rows = slice(start, start + CHUNK)
        part, at = (gather_rows(x[rows], comm, device) for x in (block.features, block.ids))
        if world.is_main:
            features[np.searchsorted(ids, at.numpy())] = part.numpy()
    bad = world.gather_objects(extractor.bad.known)
    for where, reason in {k: v for known in bad or [] for k, v in known.items()}.items():
        logger.warning("left out: %s: %s", where, reason)
    return features, ids


class Network(nn.Module):
    """Images `[n, 3, S, S]` to `r`, and `z` if wanted, side by side in one matrix."""

    def __init__(self, pretrained: Pretrained, embeddings: bool) -> None:
        super().__init__()
        self.method = pretrained.method if embeddings else None
        if embeddings and self.method is None:
            raise ValueError(
                "--embeddings: these weights have no projection head; a run's checkpoint has one"
            )
        self.backbone = pretrained.backbone

    def parts(self, x: Tensor) -> list[Tensor]:
        if self.method is None:
            return [self.backbone(x).flatten(1).float()]
        return [part.flatten(1) for part in self.method.embed(x)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x), 1)

    @torch.no_grad()
    def widths(self, size: int) -> list[int]:
        self.eval()
        return [part.shape[1] for part in self.parts(torch.zeros(1, 3, size, size))]


class Thumbnails(nn.Module):
    """Normalised images `[n, 3, S, S]` to small ones with values in [0, 1], one a row."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: EvaluateConfig) -> None:
        super().__init__()
        for name, values in zip(("mean", "std"), settings.data.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.std + self.mean).clamp(0, 1)
        mode = "area" if x.shape[-1] > THUMBNAIL else "nearest"
        return F.interpolate(x, size=(THUMBNAIL, THUMBNAIL), mode=mode).flatten(1)


def write_npz(
    path: Path,
    parts: dict[str, Array],
    labels: Array,
    ids: Array,
    class_names: Sequence[str],
    about: dict[str, Any],
) -> None:
    """`r` and `z` float32 `[m, d]`, `labels` and `ids` int64 `[m]`, `class_names`, `about` (JSON).

    Loads with `np.load(path)`, without pickles. Written atomically.
    """
    names, text = np.array(class_names, dtype=np.str_), np.array(json.dumps(about))
    arrays: dict[str, Any] = {"labels": labels, "ids": ids, "class_names": names, "about": text}
    arrays |= parts
    with replaced(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def write_projector(
    folder: Path, parts: dict[str, Array], classes: Sequence[str], ids: Array, pictures: Tensor
) -> None:
    """The files of TensorBoard's embedding projector: tensors, metadata, a sprite of thumbnails."""
    metadata = [[one_line(name), str(i)] for name, i in zip(classes, ids, strict=True)]
    from torch.utils.tensorboard import SummaryWriter  # here, so that `--help` does not wait

    with SummaryWriter(folder) as writer:
        for name, values in parts.items():
            # It prints a useless line where a folder exists already.
            with contextlib.redirect_stdout(io.StringIO()):
                writer.add_embedding(
                    values, metadata, pictures, tag=name, metadata_header=["class", "id"]
                )


def _about(
    pretrained: Pretrained, settings: EvaluateConfig, data: Dataset, name: str, split: Split
) -> dict[str, Any]:
    mean, std = settings.data.normalisation
    return {
        "weights": pretrained.description,
        "weights_sha256": pretrained.digest,
        "step": pretrained.step,
        "epoch": pretrained.epoch,
        "data": data.name,
        "split": name,
        "images": len(split),
        "images_digest": split.digest[:12],
        "image_size": settings.image_size,
        "mean": mean,
        "std": std,
        "code": environment.code_version(),
    }


def _split(data: Dataset, name: str) -> Split:
    split = data.train if name == "train" else data.val
    if split is None or not len(split):
        raise ValueError(f"--split: {data.name} has no images for validation; train is accepted")
    return split


def _make_room(wanted: Wanted) -> None:
    """Create the folders before the work starts, so that an error comes early."""
    for key, folder in (("out", wanted.out and wanted.out.parent), ("projector", wanted.projector)):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--{key}: {folder} cannot be created: {error.strerror}") from None
