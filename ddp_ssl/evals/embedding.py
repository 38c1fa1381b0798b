"""Features of a data set as NPZ, and for TensorBoard's embedding projector.

docs/export.md says what is in the files.
"""

import contextlib
import csv
import io
import json
import os
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
from ddp_ssl.distributed.agreement import on_all_ranks, on_rank_0
from ddp_ssl.errors import refused
from ddp_ssl.evals.features import Block, Extractor, gather_rows, some_of
from ddp_ssl.evals.pretrained import Pretrained, prepare
from ddp_ssl.evals.settings import EvaluateConfig
from ddp_ssl.evals.weights import Source
from ddp_ssl.logs.picture import as_rgb
from ddp_ssl.run import environment
from ddp_ssl.utils.files import replaced
from ddp_ssl.utils.progress import logger
from ddp_ssl.utils.streams import say
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
        source, settings, world, check=lambda found: Network(found, wanted.embeddings)
    )
    network = Network(pretrained, wanted.embeddings)
    splits = on_all_ranks(world, lambda: _splits(data, wanted.split))
    on_rank_0(world, lambda: _make_room(wanted))

    comm = distributed.comm_of(world)
    widths = network.widths(len(settings.data.normalisation[0]), settings.image_size)
    network.to(world.device)
    extractor = Extractor(network, sum(widths), settings, comm, world.device, tell=logger.info)
    found = {
        name: _all(extractor, split, f"{name} images of {data.name}", world)
        for name, split in splits.items()
    }
    if not any(len(ids) for _, ids in found.values()):
        count = sum(map(len, splits.values()))
        raise ConfigError(f"data.name: none of the {count} {wanted.split} images can be read")
    features = np.concatenate([rows for rows, _ in found.values()])
    parts = dict(zip(("r", "z"), np.split(features, np.cumsum(widths)[:-1], 1), strict=False))
    about = _about(pretrained, settings, data, splits)

    def write() -> None:
        if wanted.out is not None:
            images = _images(splits, {name: ids for name, (_, ids) in found.items()})
            write_features(wanted.out, parts, images, data.class_names, about)
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in parts.items())
            say(f"{wanted.out}: {shapes}, {', '.join(images)}, class names")

    on_rank_0(world, write)
    if wanted.projector is not None:
        (split,), ((_, ids),) = splits.values(), found.values()
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
        rows, names = np.searchsorted(ids, shown), dict(enumerate(data.class_names))
        write_projector(
            folder,
            {name: x[rows] for name, x in parts.items()},
            [names.get(label, "unlabelled") for label in split.labels[shown].tolist()],
            shown,
            torch.from_numpy(pictures).view(-1, 3, THUMBNAIL, THUMBNAIL),
        )
        say(
            f"{folder}: {len(shown)} of {len(ids)} images; tensorboard --logdir {folder}, then "
            "Projector"
        )

    on_rank_0(world, write)


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
        r, z = self.method.embed(x)
        if self.backbone is not self.method.backbone:  # `model.features`; z is of the run's own
            r = self.backbone(x).float()
        return [r.flatten(1), z.flatten(1)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x), 1)

    @torch.no_grad()
    def widths(self, channels: int, size: int) -> list[int]:
        self.eval()
        return [part.shape[1] for part in self.parts(torch.zeros(1, channels, size, size))]


class Thumbnails(nn.Module):
    """Normalised images `[n, C, S, S]` to small ones with values in [0, 1], one a row."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: EvaluateConfig) -> None:
        super().__init__()
        for name, values in zip(("mean", "std"), settings.data.shown, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = as_rgb(x * self.std + self.mean).clamp(0, 1)
        mode = "area" if x.shape[-1] > THUMBNAIL else "nearest"
        return F.interpolate(x, size=(THUMBNAIL, THUMBNAIL), mode=mode).flatten(1)


def _images(splits: dict[str, Split], ids: dict[str, Array]) -> dict[str, Array]:
    """What is known of each image, a row each: path, split, label and id in the split."""
    paths = [splits[name].where(i) for name, own in ids.items() for i in own.tolist()]
    return {
        "paths": np.array([_escaped(path) for path in paths]),
        "splits": np.concatenate([np.full(len(own), name) for name, own in ids.items()]),
        "labels": np.concatenate([splits[name].labels[own] for name, own in ids.items()]),
        "ids": np.concatenate(list(ids.values())),
    }


def _escaped(name: str) -> str:
    """A name that is not UTF-8 with its bytes as escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def write_features(
    path: Path,
    parts: dict[str, Array],
    images: dict[str, Array],
    class_names: Sequence[str],
    about: dict[str, Any],
) -> None:
    """`parts`: `r` and `z` float32 `[m, d]`; `images`: `_images`; written atomically.

    By the file's ending: NPZ, which `np.load(path)` reads without pickles, with `class_names` and
    `about` (JSON); CSV or parquet, a row for each image with its class and columns `r0`, `r1`, ...
    """
    class_names = [_escaped(name) for name in class_names]
    with replaced(path) as temporary:
        if path.suffix == ".npz":
            text = {"class_names": np.array(class_names, np.str_), "about": json.dumps(about)}
            arrays: dict[str, Any] = {**images, **text, **parts}
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            return
        names = dict(enumerate(class_names))
        columns: dict[str, Any] = {
            "path": images["paths"].tolist(),
            "split": images["splits"].tolist(),
            "class": [names.get(label, "") for label in images["labels"].tolist()],
            "label": images["labels"],
            "id": images["ids"],
        }
        columns |= {f"{name}{i}": x[:, i] for name, x in parts.items() for i in range(x.shape[1])}
        if path.suffix == ".csv":
            with open(temporary, "w", newline="", encoding="utf-8") as table:
                writer = csv.writer(table)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
            return
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        table_of = arrow.table(columns).replace_schema_metadata({"about": json.dumps(about)})
        parquet.write_table(table_of, temporary)


def write_projector(
    folder: Path, parts: dict[str, Array], classes: Sequence[str], ids: Array, pictures: Tensor
) -> None:
    """The files of TensorBoard's embedding projector: tensors, metadata, a sprite of thumbnails."""
    metadata = [[one_line(_escaped(name)), str(i)] for name, i in zip(classes, ids, strict=True)]
    from torch.utils.tensorboard import SummaryWriter  # here, so that `--help` does not wait

    with SummaryWriter(folder) as writer:
        for name, values in parts.items():
            # It prints a useless line where a folder exists already.
            with contextlib.redirect_stdout(io.StringIO()):
                writer.add_embedding(
                    values, metadata, pictures, tag=name, metadata_header=["class", "id"]
                )


def _about(
    pretrained: Pretrained, settings: EvaluateConfig, data: Dataset, splits: dict[str, Split]
) -> dict[str, Any]:
    mean, std = settings.data.normalisation
    return {
        "weights": pretrained.description,
        "weights_sha256": pretrained.digest,
        "step": pretrained.step,
        "epoch": pretrained.epoch,
        "data": data.name,
        "split": "+".join(splits),
        "images": sum(map(len, splits.values())),
        "images_digest": "+".join(split.digest[:12] for split in splits.values()),
        "image_size": settings.image_size,
        "mean": mean,
        "std": std,
        "code": environment.code_version(),
    }


def _splits(data: Dataset, name: str) -> dict[str, Split]:
    """The split of that name, or for `all` those that there are."""
    every = {"train": data.train, "val": data.val}
    there = {key: split for key, split in every.items() if split is not None and len(split)}
    if name != "all" and name not in there:
        raise ValueError(f"--split: {data.name} has no images for validation; train is accepted")
    return there if name == "all" else {name: there[name]}


def _make_room(wanted: Wanted) -> None:
    """Create the folders before the work starts, so that an error comes early."""
    for key, folder in (("out", wanted.out and wanted.out.parent), ("projector", wanted.projector)):
        if folder is not None:
            with refused(f"--{key}: {folder} cannot be created"):
                folder.mkdir(parents=True, exist_ok=True)
