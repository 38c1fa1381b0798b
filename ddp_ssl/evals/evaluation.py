"""One evaluation: from weights, data and settings to the files of its results."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddp_ssl.config import ConfigError
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.distributed.agreement import on_rank_0
from ddp_ssl.evals import report
from ddp_ssl.evals.features import Extractor
from ddp_ssl.evals.finetune import evaluate_finetune
from ddp_ssl.evals.knn import evaluate_knn
from ddp_ssl.evals.linear import evaluate_linear
from ddp_ssl.evals.pretrained import Pretrained, prepare
from ddp_ssl.evals.report import Report
from ddp_ssl.evals.settings import OF_PRETRAINING, SECTIONS, EvaluateConfig, Protocol, protocol_of
from ddp_ssl.evals.weights import Source
from ddp_ssl.run import environment
from ddp_ssl.utils.files import replace_text
from ddp_ssl.utils.progress import logger
from ddp_ssl.utils.streams import say


@dataclass
class Evaluation:
    command: str
    source: Source
    settings: EvaluateConfig
    world: World
    pretrained: Pretrained
    data: Dataset
    extractor: Extractor
    train: Split  # the labelled training images
    val: Split
    folder: Path
    protocol: Protocol | None = None  # the linear classifier's, as it was trained


def run(command: str, source: Source, settings: EvaluateConfig, world: World) -> None:
    """The whole evaluation, on all processes together. Raises `ConfigError`."""
    start = time.perf_counter()
    evaluation = begin(command, source, settings, world)
    result = evaluate(evaluation)
    bad = unreadable(evaluation)
    seconds = time.perf_counter() - start
    on_rank_0(world, lambda: finish(evaluation, result, bad, seconds))


def folder_of(source: Source, settings: EvaluateConfig) -> Path:
    """The folder of the results."""
    default = source.home or Path("runs") / f"evaluate-{source.name}"
    return Path(settings.run.dir or default) / "evaluate"


def begin(
    command: str,
    source: Source,
    settings: EvaluateConfig,
    world: World,
    pretrained: Pretrained | None = None,
) -> Evaluation:
    """Load data and, unless they are given, the weights; make the folder of the results.

    On all processes.
    """
    pretrained, settings, data = prepare(source, settings, world, pretrained)
    train, val = _splits(settings, data)
    folder = folder_of(source, settings)
    on_rank_0(world, lambda: folder.mkdir(parents=True, exist_ok=True))
    logger.info(
        f"{command} on {data.name}: {len(train)} training and {len(val)} test images of "
        f"{data.num_classes} classes, {settings.image_size} pixels; {world.size} process(es) on "
        f"{world.device.type}"
    )
    mean, std = (", ".join(f"{v:.4g}" for v in x) for x in settings.data.normalisation)
    logger.info(f"{settings.data.units} are normalised with mean {mean} and std {std}")
    backbone = pretrained.backbone.to(world.device)
    if settings.model.channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)
    extractor = Extractor(
        backbone,
        pretrained.width,
        settings,
        comm_of(world),
        world.device,
        digest=pretrained.digest,
        cache=folder / "features",
        tell=logger.info,
    )
    return Evaluation(
        command, source, settings, world, pretrained, data, extractor, train, val, folder
    )


def _splits(settings: EvaluateConfig, data: Dataset) -> tuple[Split, Split]:
    """Labelled training images, labelled test images. Raises `ConfigError`."""
    if data.labelled is None:
        raise ConfigError(f"data.name: {data.name} has no training image with a label")
    if data.val is None or not (data.val.labels >= 0).any():
        raise ConfigError(f"data.name: {data.name} has no test image with a label")
    known = data.val.labels >= 0
    val = data.val if known.all() else data.val.subset(np.flatnonzero(known))
    return data.labelled, val


def evaluate(evaluation: Evaluation) -> Report:
    """Run the command on all processes; raises `ConfigError` on all or on none."""
    settings, classes = evaluation.settings, evaluation.data.num_classes
    parts = evaluation.extractor, evaluation.train, evaluation.val, classes
    if evaluation.command == "linear":
        evaluation.protocol, results, best = evaluate_linear(*parts)
        return report.linear_report(evaluation.protocol, results, best, settings.linear)
    if evaluation.command == "knn":
        accuracies, bank = evaluate_knn(*parts)
        return report.knn_report(settings.knn.k, accuracies, bank)
    return report.finetune_report(
        evaluate_finetune(*parts, evaluation.world), settings.finetune.fraction
    )


def unreadable(evaluation: Evaluation) -> dict[str, str]:
    """Unreadable images of all processes, with reasons, on every process.

    Raises `ConfigError` on all if they are more than `data.max_bad_fraction` of the images.
    """
    everyones = evaluation.world.gather_objects(evaluation.extractor.bad.known)
    found: dict[str, str] = evaluation.world.broadcast_object(
        {name: why for known in everyones or [] for name, why in known.items()}
    )
    images = len(evaluation.train) + len(evaluation.val)
    bound = evaluation.settings.data.max_bad_fraction
    if len(found) > bound * images:
        first, why = next(iter(found.items()))
        raise ConfigError(
            f"data.max_bad_fraction: {len(found)} of {images} images cannot be read, more than "
            f"{bound:g} of them; the first is {ascii(first)[1:-1]} ({why}). Mend them, list them "
            "in data.skip or raise data.max_bad_fraction; ddp-ssl check-data finds all there are"
        )
    return found


def finish(
    evaluation: Evaluation, result: Report, unreadable: dict[str, str], seconds: float
) -> None:
    """Write the result files and print the table; on rank 0."""
    command, data, weights = evaluation.command, evaluation.data, evaluation.pretrained
    if unreadable:
        result.notes.append(f"{len(unreadable)} images cannot be read and are left out")
    result.notes += reservations(evaluation)
    settings = _settings(evaluation)
    stem = weights.path.stem if weights.path else evaluation.source.name
    kind = f"linear_{evaluation.settings.linear.protocol}" if command == "linear" else command
    name = evaluation.settings.run.name or f"{kind}-{data.name}-{stem}"
    path = report.free_name(evaluation.folder, name, settings)
    mean, std = evaluation.settings.data.normalisation
    facts = {
        "command": command,
        "source": evaluation.source.text,
        "weights": weights.description,
        "weights_sha256": weights.digest,
        "step": weights.step,
        "epoch": weights.epoch,
        "data": {
            **facts_of_data(evaluation),
            "classes": list(data.class_names),
            "image_size": evaluation.settings.image_size,
            "mean": mean,
            "std": std,
        },
        "settings": settings,
        "batch_size": evaluation.protocol and evaluation.protocol.batch_size,
        "processes": evaluation.world.size,
        "seconds": round(seconds, 1),
        "unreadable": unreadable,
        "environment": environment.environment(),
    }
    heading = f"{_title(evaluation)} on {data.name}, {weights.description}"
    body = "\n\n".join([heading, report.table(result), *result.notes])
    numbers = json.dumps(report.as_json(result, facts), indent=1)
    classes = report.class_table(result, data.class_names)
    replace_text(path.with_name(path.name + ".json"), numbers + "\n")
    replace_text(path.with_name(path.name + ".md"), f"{body}\n\n{classes}\n")
    say(f"\n{body}\n\n{path}.md  {path}.json  ({seconds:.0f} s)")


def facts_of_data(evaluation: Evaluation) -> dict[str, Any]:
    """Name, counts and digests of the images."""
    return {
        "name": evaluation.data.name,
        "training_images": len(evaluation.train),
        "test_images": len(evaluation.val),
        "training_digest": evaluation.train.digest[:12],
        "test_digest": evaluation.val.digest[:12],
    }


def reservations(evaluation: Evaluation) -> list[str]:
    """Notes to read before the table is quoted."""
    notes = []
    weights, val = evaluation.pretrained, evaluation.data.val
    chosen = weights.path is not None and weights.path.name == "best.pt"
    if chosen and val is not None and weights.test_images == val.digest[:12]:
        assert weights.config is not None
        notes.append(
            f"this checkpoint was chosen among the run's by {weights.config.checkpoint.best} on "
            "these very test images, which favours it; the newest one (RUN) was not chosen by them"
        )
    p, asked = evaluation.protocol, protocol_of(evaluation.settings.linear).batch_size
    if p is not None and p.batch_size != asked:
        notes.append(
            f"batch of {p.batch_size} images instead of {asked}: it splits evenly over "
            f"{evaluation.world.size} process(es), and there are {len(evaluation.train)} training "
            "images"
        )
    return notes


def _title(evaluation: Evaluation) -> str:
    settings = evaluation.settings
    if evaluation.command == "linear":
        p = evaluation.protocol or protocol_of(settings.linear)
        count = settings.linear.per_class
        few = "" if count is None else f"{count} label(s) a class, "
        views = "random crops" if settings.linear.augment else f"{p.patches} view(s) an image"
        return (
            f"Linear classifier, {p.name} protocol ({p.epochs} epochs, batch {p.batch_size}, "
            f"{views}, {few}{len(settings.linear.seeds)} seed(s)),"
        )
    if evaluation.command == "knn":
        return f"k-NN (temperature {settings.knn.temperature:g})"
    f = settings.finetune
    return (
        f"Fine-tuning ({f.optimizer}, lr {f.lr:g}, backbone {f.backbone_lr:g} of it, "
        f"{f.epochs} epochs)"
    )


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    """The settings that the result depends on, as plain values."""
    tree = evaluation.settings.model_dump(mode="json")
    used: dict[str, Any] = {
        name: tree[name] for name in SECTIONS[evaluation.command] if name != "run"
    }
    for key in OF_PRETRAINING:
        used["data"].pop(key.partition(".")[2], None)
    used["run"] = {"seed": tree["run"]["seed"]}
    return used | {"weights": evaluation.pretrained.digest}
