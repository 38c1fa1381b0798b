"""Evaluate a pretrained backbone: `python -m ddp_ssl.evaluate linear RUN [key=value ...]`.

Linear classifier, k-NN, fine-tuning, and the dynamics of a finished run, alone or under torchrun or
srun. Exit codes: 0 done, 1 failed, 2 the weights, the settings or the data cannot be used.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ddp_ssl.commands import common
from ddp_ssl.config import Config, ConfigError, Resolved, Section, reference_of
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.distributed.agreement import on_all_ranks
from ddp_ssl.evals import dynamics, report
from ddp_ssl.evals.features import Extractor, teller
from ddp_ssl.evals.finetune import evaluate_finetune
from ddp_ssl.evals.knn import evaluate_knn
from ddp_ssl.evals.linear import evaluate_linear
from ddp_ssl.evals.pretrained import Pretrained, prepare
from ddp_ssl.evals.report import Report
from ddp_ssl.evals.settings import (
    COMMANDS,
    OF_PRETRAINING,
    EvaluateConfig,
    Protocol,
    load_settings,
    protocol_of,
)
from ddp_ssl.evals.weights import Source, find_source
from ddp_ssl.run import environment
from ddp_ssl.run.signals import stop_with_parent
from ddp_ssl.utils.files import replace_text

USAGE = """usage: python -m ddp_ssl.evaluate COMMAND SOURCE [CONFIG.yaml] [key=value ...]
       torchrun --nproc_per_node N -m ddp_ssl.evaluate COMMAND SOURCE [CONFIG.yaml] [key=value ...]
       ddp-ssl evaluate COMMAND SOURCE [CONFIG.yaml] [key=value ...]

COMMAND
  linear    train a linear classifier on frozen features
  knn       classify by the nearest training images
  finetune  train the whole network on a share of the labels
  dynamics  measure every checkpoint of a finished run

SOURCE
  RUN, RUN:last    a run folder: its newest good checkpoint; data and model are the run's
  RUN:best         its best checkpoint
  FILE             a checkpoint, or anybody's weights (.pt, .pth, .safetensors); these need
                   model.backbone=NAME
  timm:NAME        timm's model, with random weights; with a tag (resnet18.a1_in1k) pretrained

  --help           this text and every key with its type and default; of one COMMAND if it is given
  --print-config   the resolved settings and where each value came from
"""

# The sections that a command reads; of `eval` all read the batch size.
SECTIONS = {
    "linear": ("run", "model", "data", "linear"),
    "knn": ("run", "model", "data", "knn"),
    "finetune": ("run", "model", "data", "finetune"),
    "dynamics": ("run", "data", "eval", "measure"),
}
# Keys of `run` that `dynamics` does not use: it takes them from the finished run.
NOT_OF_DYNAMICS = ("run.name", "run.seed", "run.cache_mb")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    stop_with_parent()
    words = sys.argv[1:] if arguments is None else arguments
    return common.exit_code(lambda: _main(words))


def _main(arguments: Sequence[str]) -> int:
    wants_help, wants_config, words = common.split_options(arguments)
    if wants_help:
        common.say(_help(words[0] if words and words[0] in COMMANDS else None))
        return 0
    command, source, rest = _parse(words)
    settings, origins = load_settings(source, rest)
    _check(command, source, origins)
    if wants_config:
        common.say(Resolved(cast(Config, settings), origins).to_yaml().rstrip("\n"))
        return 0
    return run(command, source, settings)


def _parse(words: list[str]) -> tuple[str, Source, list[str]]:
    """Command, source and the rest."""
    accepted = ", ".join(COMMANDS)
    if not words:
        raise ConfigError(f"what to do is missing: one of {accepted}; --help says more")
    command, *rest = words
    if command not in COMMANDS:
        raise ConfigError(f"{command}: unknown command; accepted: {accepted}")
    # A sweep's folders are named seed=0, seed=1, ...
    if not rest or ("=" in rest[0] and not Path(re.sub(":(best|last)$", "", rest[0])).exists()):
        raise ConfigError(
            f"{command}: the weights are missing: a run folder, RUN:best, RUN:last, a file or "
            "timm:NAME comes after the command"
        )
    return command, find_source(rest[0]), rest[1:]


def _check(command: str, source: Source, origins: Mapping[str, str]) -> None:
    """Raise `ConfigError` for what this command does not use."""
    if command == "dynamics" and source.home is None:
        raise ConfigError(f"dynamics: {source.text} is no run; a run folder would be accepted")
    for key, origin in origins.items():
        if origin == "command line" and not _used(command, key):
            raise ConfigError(
                f"{key}: not used by {command}; its own keys begin with "
                f"{', '.join(f'{s}.' for s in SECTIONS[command])}"
            )


def _used(command: str, key: str) -> bool:
    if command == "dynamics" and key in NOT_OF_DYNAMICS:
        return False
    return key.partition(".")[0] in SECTIONS[command] or key == "eval.batch_size"


def _help(command: str | None) -> str:
    rows = [
        row
        for row in reference_of(EvaluateConfig)
        if row[0] not in OF_PRETRAINING and (command is None or _used(command, row[0]))
    ]
    return "\n".join([USAGE, *common.describe_keys(rows, lambda name: _docstring(name, command))])


def _docstring(section: str, command: str | None) -> str:
    """A section's first line; "" for `eval` where the command uses its batch size only."""
    if section == "eval" and command not in (None, "dynamics"):
        return ""
    kind = EvaluateConfig.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, Section)
    return (kind.__doc__ or "").partition("\n")[0]


# --- one evaluation ------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Weights, data and settings of one evaluation."""

    command: str
    source: Source
    settings: EvaluateConfig
    world: World
    pretrained: Pretrained
    data: Dataset
    extractor: Extractor
    train: Split
    """The labelled training images."""
    val: Split
    folder: Path
    protocol: Protocol | None = None
    """The linear classifier's, as it was trained."""


def run(command: str, source: Source, settings: EvaluateConfig) -> int:
    """The whole evaluation; returns the exit code. Raises `ConfigError`."""
    with common.processes(settings.run) as world:
        if command == "dynamics":
            assert source.home is not None
            return dynamics.run(settings, source.home, world)
        start = time.perf_counter()
        evaluation = begin(command, source, settings, world)
        result = evaluate(evaluation)
        bad = unreadable(evaluation)
        seconds = time.perf_counter() - start
        on_all_ranks(
            world, lambda: finish(evaluation, result, bad, seconds) if world.is_main else None
        )
    return 0


def begin(command: str, source: Source, settings: EvaluateConfig, world: World) -> Evaluation:
    """Load weights and data, and make the folder of the results; on all processes."""
    pretrained, settings, data = prepare(source, settings, world)
    train, val = _splits(settings, data)
    default = source.home or Path("runs") / f"evaluate-{source.name}"
    folder = Path(settings.run.dir or default) / "evaluate"
    on_all_ranks(
        world, lambda: folder.mkdir(parents=True, exist_ok=True) if world.is_main else None
    )
    tell = teller(world)
    tell(
        f"{command} on {data.name}: {len(train)} training and {len(val)} test images of "
        f"{data.num_classes} classes, {settings.image_size} pixels; {world.size} process(es) on "
        f"{world.device.type}"
    )
    mean, std = (", ".join(f"{v:.4g}" for v in x) for x in settings.data.normalisation)
    tell(f"pixels in [0, 1] are normalised with mean {mean} and std {std}")
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
        tell=tell,
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
        return report.linear_report(evaluation.protocol, results, best, settings.linear.held_out)
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
    result.notes += _reservations(evaluation)
    settings = _settings(evaluation)
    stem = weights.path.stem if weights.path else evaluation.source.name
    kind = f"linear_{evaluation.settings.linear.protocol}" if command == "linear" else command
    name = evaluation.settings.run.name or f"{kind}-{data.name}-{stem}"
    path = report.free_name(evaluation.folder, name, settings)
    facts = {
        "command": command,
        "source": evaluation.source.text,
        "weights": weights.description,
        "weights_sha256": weights.digest,
        "step": weights.step,
        "epoch": weights.epoch,
        "data": _data_facts(evaluation),
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
    print(f"\n{body}\n\n{path}.md  {path}.json  ({seconds:.0f} s)", flush=True)


def _reservations(evaluation: Evaluation) -> list[str]:
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
    """The evaluation in a few words."""
    settings = evaluation.settings
    if evaluation.command == "linear":
        p = evaluation.protocol or protocol_of(settings.linear)
        views = "random crops" if settings.linear.augment else f"{p.patches} view(s) an image"
        return (
            f"Linear classifier, {p.name} protocol ({p.epochs} epochs, batch {p.batch_size}, "
            f"{views}, {len(settings.linear.seeds)} seed(s)),"
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


def _data_facts(evaluation: Evaluation) -> dict[str, Any]:
    mean, std = evaluation.settings.data.normalisation
    return {
        "name": evaluation.data.name,
        "training_images": len(evaluation.train),
        "test_images": len(evaluation.val),
        "training_digest": evaluation.train.digest[:12],
        "test_digest": evaluation.val.digest[:12],
        "classes": list(evaluation.data.class_names),
        "image_size": evaluation.settings.image_size,
        "mean": mean,
        "std": std,
    }


if __name__ == "__main__":
    sys.exit(main())
