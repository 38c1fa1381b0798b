"""Evaluate a pretrained backbone: `python -m ddp_ssl.evaluate linear RUN [key=value ...]`.

Linear classifier, k-NN, fine-tuning, and the dynamics of a finished run, alone or under torchrun or
srun. Exit codes: 0 done, 1 failed, 2 the weights, the settings or the data cannot be used.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ddp_ssl.config import Config, ConfigError, Resolved, Section, reference_of
from ddp_ssl.evals.settings import (
    COMMANDS,
    OF_PRETRAINING,
    EvaluateConfig,
    Protocol,
    Source,
    find_source,
    load_settings,
    protocol_of,
)
from ddp_ssl.launch import cpu_share, rank_and_size
from ddp_ssl.run.signals import stop_with_parent
from ddp_ssl.utils.text import one_line

if TYPE_CHECKING:
    from ddp_ssl.data.datasets import Dataset, Split
    from ddp_ssl.distributed import World
    from ddp_ssl.evals.features import Extractor
    from ddp_ssl.evals.pretrained import Pretrained
    from ddp_ssl.evals.report import Report

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
# Of `run`, what a measurement of a finished run has no use for: all else is as it was trained.
NOT_OF_DYNAMICS = ("run.name", "run.seed", "run.cache_mb")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    stop_with_parent()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    rank, _ = rank_and_size()
    options = {"-h", "--help", "--print-config"} & set(arguments)
    words = [a for a in arguments if a not in options]
    try:
        if options & {"-h", "--help"}:
            if rank == 0:
                print(_help(words[0] if words and words[0] in COMMANDS else None))
            return 0
        command, source, rest = _parse(words)
        settings, origins = load_settings(source, rest)
        _check(command, source, origins)
        if options:
            if rank == 0:
                print(Resolved(cast(Config, settings), origins).to_yaml(), end="")
            return 0
        return run(command, source, settings)
    except ConfigError as error:
        if rank == 0:
            print(f"ddp_ssl: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends all ranks at the first exit; rank 0 must have spoken
        return 2
    except KeyboardInterrupt:
        return 130


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
    lines, section = [USAGE], ""
    for key, kind, default, text in reference_of(EvaluateConfig):
        shown = command is None or _used(command, key)
        if key in OF_PRETRAINING or not shown:
            continue
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            shared = section == "eval" and command not in (None, "dynamics")
            lines.append(f"\n{section}:" + ("" if shared else f" {_docstring(section)}"))
        lines.append(f"  {key}  ({kind}, default {default})\n      {text}")
    return "\n".join(lines)


def _docstring(section: str) -> str:
    kind = EvaluateConfig.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, Section)
    return (kind.__doc__ or "").partition("\n")[0]


# --- one evaluation ------------------------------------------------------------------------------


@dataclass
class Work:
    """What every command starts from."""

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
    """Of the linear classifier, as it was trained."""


def run(command: str, source: Source, settings: EvaluateConfig) -> int:
    """The whole evaluation; returns the exit code. Raises `ConfigError`."""
    import torch

    from ddp_ssl import distributed
    from ddp_ssl.agreement import on_all_ranks
    from ddp_ssl.logs import console

    try:
        world = distributed.start(settings.run.device, settings.run.timeout_s)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    console.setup_logging(None, world.rank)
    torch.set_num_threads(settings.run.threads or cpu_share())
    code = 0
    try:
        if command == "dynamics":
            from ddp_ssl.evals import dynamics

            assert source.home is not None
            code = int(dynamics.run(settings, source.home, world))
        else:
            start = time.perf_counter()
            work = prepare(command, source, settings, world)
            report = evaluate(work)
            bad = unreadable(work)
            seconds = time.perf_counter() - start
            on_all_ranks(
                world, lambda: finish(work, report, bad, seconds) if world.is_main else None
            )
    except ConfigError:  # raised by all processes together
        distributed.stop()
        raise
    except Exception as error:
        end_alone(error, world)
    distributed.stop()
    return code


def end_alone(error: Exception, world: World) -> NoReturn:
    """Say at once what went wrong on this process, and end it as it is.

    The others may wait for it in a collective: leaving the group in order would wait for them, and
    the launcher ends them when this process is gone.
    """
    import logging

    from ddp_ssl.data.source import UnreadableError
    from ddp_ssl.distributed import others_failed

    logger, text = logging.getLogger("ddp_ssl"), one_line(error)
    if isinstance(error, UnreadableError):
        logger.error("%s", text)
    elif world.size > 1 and others_failed(error):
        logger.error("another process failed or left: %s", text[:200])
    else:
        logger.error("%s: %s", type(error).__name__, text, exc_info=error)
    raise SystemExit(1) from None


def prepare(command: str, source: Source, settings: EvaluateConfig, world: World) -> Work:
    """Find the data, load the weights, claim a place for the results; on all processes."""
    import torch

    from ddp_ssl.agreement import on_all_ranks
    from ddp_ssl.data import datasets
    from ddp_ssl.data.build import load_data
    from ddp_ssl.distributed import comm_of
    from ddp_ssl.evals.features import Extractor
    from ddp_ssl.evals.pretrained import load_pretrained, normalised

    on_all_ranks(world, lambda: datasets.find(settings.data))
    pretrained = on_all_ranks(
        world,
        lambda: load_pretrained(
            source, settings.model, [settings.image_size], seed=settings.run.seed
        ),
    )
    tell = _teller(world)
    tell(pretrained.description)
    settings = normalised(settings, pretrained)
    on_all_ranks(world, lambda: datasets.stage(settings.data))
    data = load_data(cast(Config, settings), world)  # which reads `data` and `run.seed`
    train, val = _splits(settings, data)
    default = source.home or Path("runs") / f"evaluate-{source.name}"
    folder = Path(settings.run.dir or default) / "evaluate"
    on_all_ranks(
        world, lambda: folder.mkdir(parents=True, exist_ok=True) if world.is_main else None
    )
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
    return Work(command, source, settings, world, pretrained, data, extractor, train, val, folder)


def _splits(settings: EvaluateConfig, data: Dataset) -> tuple[Split, Split]:
    """Labelled training images, labelled test images. Raises `ConfigError`."""
    import numpy as np

    if data.labelled is None:
        raise ConfigError(f"data.name: {data.name} has no training image with a label")
    if data.val is None or not (data.val.labels >= 0).any():
        raise ConfigError(f"data.name: {data.name} has no test image with a label")
    known = data.val.labels >= 0
    val = data.val if known.all() else data.val.subset(np.flatnonzero(known))
    return data.labelled, val


def _teller(world: World) -> Any:
    import logging

    logger = logging.getLogger("ddp_ssl")
    return logger.info if world.is_main else lambda line: None


def evaluate(work: Work) -> Report:
    """What the command asks for, on all processes; raises `ConfigError` on all or on none."""
    from ddp_ssl.evals import report
    from ddp_ssl.evals.finetune import evaluate_finetune
    from ddp_ssl.evals.linear import evaluate_linear
    from ddp_ssl.evals.neighbours import evaluate_knn

    settings, classes = work.settings, work.data.num_classes
    parts = work.extractor, work.train, work.val, classes
    if work.command == "linear":
        work.protocol, results, best = evaluate_linear(*parts)
        return report.linear_report(work.protocol, results, best, settings.linear.held_out)
    if work.command == "knn":
        accuracies, bank = evaluate_knn(*parts)
        return report.knn_report(settings.knn.k, accuracies, bank)
    return report.finetune_report(evaluate_finetune(*parts, work.world), settings.finetune.fraction)


def unreadable(work: Work) -> dict[str, str]:
    """What no process could read, with the reason, on all; `ConfigError` on all if it is more than
    `data.max_bad_fraction` of the images."""
    everyones = work.world.gather_objects(work.extractor.bad.known)
    found: dict[str, str] = work.world.broadcast_object(
        {name: why for known in everyones or [] for name, why in known.items()}
    )
    images, bound = len(work.train) + len(work.val), work.settings.data.max_bad_fraction
    if len(found) > bound * images:
        first, why = next(iter(found.items()))
        raise ConfigError(
            f"data.max_bad_fraction: {len(found)} of {images} images cannot be read, more than "
            f"{bound:g} of them; the first is {ascii(first)[1:-1]} ({why}). Mend them, list them "
            "in data.skip or raise data.max_bad_fraction; tools/check_data.py finds all there are"
        )
    return found


def finish(work: Work, report: Report, unreadable: dict[str, str], seconds: float) -> None:
    """Write the result files and print the table; on rank 0."""
    import json

    from ddp_ssl.evals.report import as_json, class_table, free_name, table, write
    from ddp_ssl.run import environment

    if unreadable:
        report.notes.append(f"{len(unreadable)} images cannot be read and are left out")
    report.notes += _reservations(work)
    settings = _settings(work)
    stem = work.pretrained.path.stem if work.pretrained.path else work.source.name
    kind = f"linear_{work.settings.linear.protocol}" if work.command == "linear" else work.command
    name = work.settings.run.name or f"{kind}-{work.data.name}-{stem}"
    path = free_name(work.folder, name, settings)
    facts = {
        "command": work.command,
        "source": work.source.text,
        "weights": work.pretrained.description,
        "weights_sha256": work.pretrained.digest,
        "step": work.pretrained.step,
        "epoch": work.pretrained.epoch,
        "data": _data_facts(work),
        "settings": settings,
        "batch_size": work.protocol and work.protocol.batch_size,
        "processes": work.world.size,
        "seconds": round(seconds, 1),
        "unreadable": unreadable,
        "environment": environment.environment(),
    }
    heading = f"{_what(work)} on {work.data.name}, {work.pretrained.description}"
    body = "\n\n".join([heading, table(report), *report.notes])
    text = f"{body}\n\n{class_table(report, work.data.class_names)}\n"
    write(path.with_name(path.name + ".json"), json.dumps(as_json(report, facts), indent=1) + "\n")
    write(path.with_name(path.name + ".md"), text)
    print(f"\n{body}\n\n{path}.md  {path}.json  ({seconds:.0f} s)", flush=True)


def _reservations(work: Work) -> list[str]:
    """What a reader of the table must know before quoting it."""
    notes = []
    weights, val = work.pretrained, work.data.val
    chosen = weights.path is not None and weights.path.name == "best.pt"
    if chosen and val is not None and weights.test_images == val.digest[:12]:
        assert weights.config is not None
        notes.append(
            f"this checkpoint was chosen among the run's by {weights.config.checkpoint.best} on "
            "these very test images, which favours it; the newest one (RUN) was not chosen by them"
        )
    p = work.protocol
    if p is not None and p.batch_size != protocol_of(work.settings.linear).batch_size:
        asked = protocol_of(work.settings.linear).batch_size
        notes.append(
            f"batch of {p.batch_size} images instead of {asked}: it splits evenly over "
            f"{work.world.size} process(es), and there are {len(work.train)} training images"
        )
    return notes


def _what(work: Work) -> str:
    """The evaluation in a few words."""
    settings = work.settings
    if work.command == "linear":
        p = work.protocol or protocol_of(settings.linear)
        views = "random crops" if settings.linear.augment else f"{p.patches} view(s) an image"
        return (
            f"Linear classifier, {p.name} protocol ({p.epochs} epochs, batch {p.batch_size}, "
            f"{views}, {len(settings.linear.seeds)} seed(s)),"
        )
    if work.command == "knn":
        return f"k-NN (temperature {settings.knn.temperature:g})"
    f = settings.finetune
    return (
        f"Fine-tuning ({f.optimizer}, lr {f.lr:g}, backbone {f.backbone_lr:g} of it, "
        f"{f.epochs} epochs)"
    )


def _settings(work: Work) -> dict[str, Any]:
    """What the result depends on, as plain values."""
    tree = work.settings.model_dump(mode="json")
    used: dict[str, Any] = {name: tree[name] for name in SECTIONS[work.command] if name != "run"}
    for key in OF_PRETRAINING:
        used["data"].pop(key.partition(".")[2], None)
    used["run"] = {"seed": tree["run"]["seed"]}
    return used | {"weights": work.pretrained.digest}


def _data_facts(work: Work) -> dict[str, Any]:
    mean, std = work.settings.data.normalisation
    return {
        "name": work.data.name,
        "training_images": len(work.train),
        "test_images": len(work.val),
        "training_digest": work.train.digest[:12],
        "test_digest": work.val.digest[:12],
        "classes": list(work.data.class_names),
        "image_size": work.settings.image_size,
        "mean": mean,
        "std": std,
    }


if __name__ == "__main__":
    sys.exit(main())
