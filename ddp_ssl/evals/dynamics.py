"""The metrics of a validation pass for every checkpoint of a run: how a representation developed.

Writes `dynamics.jsonl` into the run folder, one line per checkpoint as soon as it is measured. At
the end it writes `evaluate/dynamics.md` and `evaluate/dynamics.json`. On other data than the run's
own the files are `dynamics-DATA.*`. A checkpoint that was measured with the same settings is not
measured again, so an interrupted measurement continues. Rows of other settings stay in the file.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ddp_ssl import distributed
from ddp_ssl.checkpoint import store
from ddp_ssl.checkpoint.store import CheckpointInfo
from ddp_ssl.config import Config, ConfigError
from ddp_ssl.data.build import load_data
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.distributed import World
from ddp_ssl.distributed.agreement import on_all_ranks, on_rank_0
from ddp_ssl.evals.settings import EvaluateConfig, config_of_run
from ddp_ssl.evals.validation import Validation
from ddp_ssl.evals.weights import fill, make_learner, read_checkpoint
from ddp_ssl.methods._learner import Learner
from ddp_ssl.utils.files import if_readable, replace_text
from ddp_ssl.utils.progress import logger
from ddp_ssl.utils.text import markdown_lines

FILE = "dynamics.jsonl"

# The table's columns and their digits; the JSON files hold all metrics.
COLUMNS = {
    "eval/knn_top1": ("k-NN", 3),
    "eval/probe_top1": ("probe", 3),
    "rep/effective_rank_r": ("rank R", 1),
    "rep/effective_rank_z": ("rank Z", 1),
    "rep/mutual_information": ("I(R;Z)", 4),
    "rep/alpha_req_r": ("α-ReQ R", 2),
    "rep/eigenvalue_count_r": ("count R", 0),
    "rep/eigenvalue_count_z": ("count Z", 0),
    "rep/cev_r": ("CEV R", 3),
    "rep/cev_z": ("CEV Z", 3),
    "rep/uniformity_r": ("unif. R", 2),
    "rep/uniformity_z": ("unif. Z", 2),
    "rep/alignment_z": ("align. Z", 3),
    "rep/lidar_r": ("LiDAR R", 1),
}


@dataclass(frozen=True)
class Row:
    """The metrics of one checkpoint."""

    step: int
    epoch: int
    checkpoint: str
    sha256: str
    settings: str  # short hash of everything that the metrics depend on, except the weights
    metrics: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; NaN and infinities as the strings that `float` reads."""
        metrics = {n: v if math.isfinite(v) else str(v) for n, v in self.metrics.items()}
        fields = {name: value for name, value in vars(self).items() if name != "metrics"}
        return fields | {"figures": metrics}

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.as_dict(), allow_nan=False) + "\n"


def latest(path: Path) -> list[Row]:
    """The rows of the settings that were measured last, in order of steps."""
    rows = read(path)
    newest = [row for row in rows if row.settings == rows[-1].settings]
    return sorted(newest, key=lambda row: row.step)


def read(path: Path) -> list[Row]:
    """The rows of a `dynamics.jsonl`, as they were written; none if there is no such file.

    An incomplete line is left out.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = (if_readable(partial(_row, line)) for line in lines if line.endswith(b"\n"))
    return [row for row in rows if row is not None]


def _row(line: bytes) -> Row:
    fields = json.loads(line)
    metrics = {name: float(value) for name, value in fields.pop("figures").items()}
    return Row(**fields, metrics=metrics)


def run(settings: EvaluateConfig, home: Path, world: World, trusted: str = "") -> int:
    """Measure every checkpoint of the run folder `home`, on all processes together.

    `settings.data`, `eval` and `measure` replace the run's own. `trusted` is that of
    `config_of_run`. Returns the exit code: 1 if a checkpoint could not be loaded. Raises
    `ConfigError`, on all processes, if nothing can be measured.
    """
    own, out = config_of_run(home, trusted), Path(settings.run.dir or home)
    config = own.model_copy(
        update={"data": settings.data, "eval": settings.eval, "measure": settings.measure}
    )
    found, best, images = on_rank_0(world, lambda: (*chosen(home), validation_images(home)))
    if not found:
        raise ConfigError(f"{home / 'checkpoints'}: no checkpoint; a run that saved one is needed")
    on_all_ranks(world, lambda: registry.find(config.data))
    on_all_ranks(world, lambda: registry.stage(config.data))
    data = load_data(config, world)
    if data.val is None or not len(data.val):
        raise ConfigError(f"data.name: {config.data.name} has no images for validation here")
    comm = distributed.comm_of(world)
    validation = Validation(data, config, comm, world.device, BadImages())
    learner: Learner | None = None
    key = fingerprint(config, data, world.size)
    same = config.data.name == own.data.name and images in (None, data.val.digest[:12])
    file = out / (FILE if same else f"dynamics-{data.name}.jsonl")
    rows = on_rank_0(world, lambda: kept(file, key, found))
    said = f"; {len(rows)} are measured already" if rows else ""
    more = "" if config.measure.views else "; measure.views=10 adds alignment and LiDAR"
    logger.info("%s: checkpoints at %d steps%s%s", home, len(found), said, more)
    failures = 0
    for number, one in enumerate(found, 1):
        if one.sha256 in rows:
            continue
        start = time.perf_counter()
        try:
            learner = on_all_ranks(world, partial(load, one, config, learner, world))
        except ConfigError as error:  # on all processes together
            failures += 1
            if world.is_main:
                logger.error("left out: %s", error)
            continue
        metrics = measured(validation, learner, data)
        row = rows[one.sha256] = Row(one.step, one.epoch, one.path.name, one.sha256, key, metrics)
        on_rank_0(world, partial(append, file, row))
        seconds = time.perf_counter() - start
        logger.info("%d/%d %s (%.0f s)", number, len(found), brief(row), seconds)
    ordered = sorted(rows.values(), key=lambda row: row.step)
    place = out / "evaluate" / f"{file.stem}.md"
    if rows:
        on_rank_0(world, lambda: write(place, ordered, best))
        logger.info("\n%s\n\nin %s; all metrics in %s", table(ordered, best), place, file)
    world.barrier()
    return int(failures > 0)


def load(found: CheckpointInfo, config: Config, learner: Learner | None, world: World) -> Learner:
    """Method and probe as they were, in the network of the checkpoint before if there is one."""
    weights = read_checkpoint(found.path, found.sha256)["model"]
    if learner is not None:
        fill(learner, weights, found.path)
        return learner
    sizes, comm = [config.data.central_crop.size], distributed.comm_of(world)
    learner = make_learner(config, weights, found.path, comm, sizes).to(world.device)
    if config.model.channels_last:
        learner.to(memory_format=torch.channels_last)
    return learner


def chosen(home: Path) -> tuple[list[CheckpointInfo], str | None]:
    """The checkpoints that led to the newest one, in order of steps; the SHA-256 of the best.

    A run that went back to an older step leaves checkpoints of later steps behind. They no longer
    belong to it.
    """
    found = store.find(home)  # the last saved first
    best: CheckpointInfo | None = None
    with contextlib.suppress(OSError, ValueError):
        best = CheckpointInfo.read(home / "checkpoints" / "best.json")
    if best is not None and best.sha256 not in [one.sha256 for one in found]:
        found = sorted([*found, best], key=lambda f: f.serial, reverse=True)
    way: list[CheckpointInfo] = []
    for one in found:
        if not way or one.step < way[-1].step:
            way.append(one)
    return way[::-1], None if best is None else best.sha256


def validation_images(home: Path) -> str | None:
    """Digest of the run's own validation images, if its newest good checkpoint has it."""
    good = store.newest_good(home)
    said = {} if good is None else store.load(good.path).get("identity", {})
    return cast(str | None, said.get("validation images"))


def fingerprint(config: Config, data: Dataset, world_size: int) -> str:
    """Short hash of everything that the metrics depend on, except the weights."""
    assert data.val is not None
    evaluation = config.eval.model_dump(include={"knn", "knn_k", "knn_temperature", "knn_bank"})
    parts: list[Any] = [
        evaluation,
        config.measure.model_dump(exclude={"every"}),
        [None if split is None else split.digest for split in (data.labelled, data.val)],
        [config.data.central_crop, config.data.normalisation],
        config.run.seed,
    ]
    if config.measure.views:  # each process draws its own
        parts += [config.data.model_dump(include={"views", "color_jitter"})]
        parts += [config.eval.batch_size, world_size]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def kept(path: Path, key: str, found: list[CheckpointInfo]) -> dict[str, Row]:
    """The rows of earlier calls for these checkpoints and the settings `key`, by SHA-256.

    Rewrites the file on rank 0: the rows of `key` come last. No row is dropped.
    """
    before = read(path)
    wanted = {one.sha256 for one in found}
    own = [row for row in before if row.settings == key]
    others = [row for row in before if row.settings != key]
    if others:
        logger.info("%s: %d rows of other settings or data stay in it", path, len(others))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(row.to_json() for row in [*others, *own]))
    return {row.sha256: row for row in own if row.sha256 in wanted}


def measured(validation: Validation, learner: Learner, data: Dataset) -> dict[str, float]:
    """All metrics of the weights in `learner`; the probe's only on the classes it learned."""
    fits = learner.probe is not None and learner.probe.out_features == data.num_classes
    metrics = validation.metrics(learner.method, learner.probe if fits else None, True, True)
    metrics["perf/measure_s"] = validation.measure_s
    return {name: float(value) for name, value in metrics.items()}


def append(path: Path, row: Row) -> None:
    """Add a line and sync it to the disk."""
    with open(path, "a") as file:
        file.write(row.to_json())
        file.flush()
        os.fsync(file.fileno())


def write(place: Path, rows: list[Row], best: str | None) -> None:
    """Write the table, and all metrics as `.json` beside it."""
    place.parent.mkdir(exist_ok=True)
    replace_text(place, table(rows, best) + "\n")
    found = [row.as_dict() | {"best": row.sha256 == best} for row in rows]
    replace_text(place.with_suffix(".json"), json.dumps(found, indent=1) + "\n")


def brief(row: Row) -> str:
    """The first columns, for a progress line."""
    shown = [
        f"{label} {row.metrics[name]:.{digits}f}"
        for name, (label, digits) in list(COLUMNS.items())[:5]
        if name in row.metrics
    ]
    return f"step {row.step}: {'  '.join(shown)}"


def table(rows: list[Row], best: str | None = None) -> str:
    """Markdown: a line per checkpoint, the columns that any of them has; * marks `best`."""
    columns = {n: c for n, c in COLUMNS.items() if any(n in row.metrics for row in rows)}
    cells = [["step", "epoch", *(label for label, _ in columns.values())]]
    for row in rows:
        values = [
            f"{row.metrics[name]:.{digits}f}" if name in row.metrics else "–"
            for name, (_, digits) in columns.items()
        ]
        cells.append([f"{row.step}{' *' if row.sha256 == best else ''}", str(row.epoch), *values])
    note = ["", "\\* the best checkpoint"] if best in {row.sha256 for row in rows} else []
    return "\n".join(markdown_lines(cells, ">") + note)
