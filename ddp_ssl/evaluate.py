"""Evaluate a pretrained backbone: `python -m ddp_ssl.evaluate linear RUN [key=value ...]`.

Linear classifier, k-NN, fine-tuning, the dynamics of a finished run, and a suite of small data
sets, alone or under torchrun or srun. Exit codes: 0 done, 1 failed, 2 the weights, the settings or
the data cannot be used.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from ddp_ssl.commands import common
from ddp_ssl.config import Config, ConfigError, Resolved, reference_of
from ddp_ssl.evals.settings import OF_PRETRAINING, SECTIONS, EvaluateConfig, load_settings
from ddp_ssl.evals.weights import Source, find_source
from ddp_ssl.run.signals import stop_with_parent
from ddp_ssl.utils.streams import say
from ddp_ssl.utils.text import summary

USAGE = """usage: ddp-ssl evaluate COMMAND SOURCE [CONFIG.yaml] [key=value ...]
       python -m ddp_ssl.evaluate COMMAND SOURCE [CONFIG.yaml] [key=value ...]
       torchrun --nproc_per_node N -m ddp_ssl.evaluate COMMAND SOURCE ...

COMMAND
  linear    train a linear classifier on frozen features
  knn       classify by the nearest training images
  finetune  train the whole network on a share of the labels
  dynamics  measure every checkpoint of a finished run
  suite     linear, k-NN, 10 and 1 labels a class on the small data sets in
            data.root; data.name=NAME,NAME takes these alone

SOURCE
  RUN, RUN:last    a run folder: its newest good checkpoint; data and model are
                   the run's
  RUN:best         its best checkpoint
  RUN:ema          the average of its weights (model.ema); also RUN:best:ema
  FILE             a checkpoint, or anybody's weights (.pt, .pth, .safetensors);
                   these need model.backbone=NAME
  timm:NAME        timm's model, with random weights; with a tag
                   (resnet18.a1_in1k) pretrained
  hf-hub:USER/NAME a model of timm's on the Hugging Face hub, pretrained

  --help           this text and every key with its type and default; of one
                   COMMAND, a section or a key if it is given
  --print-config   the resolved settings and where each value came from
  --trust          let the run import a method from outside this package
                   (module:Class)
  --against RUN    suite: print the difference to another run's result, or to a
                   .json file of it
"""

# Keys of `run` that `dynamics` does not use: it takes them from the finished run.
NOT_OF_DYNAMICS = ("run.name", "run.seed", "run.cache_mb")


def main(arguments: Sequence[str] | None = None) -> int:
    stop_with_parent()
    words = sys.argv[1:] if arguments is None else arguments
    return common.exit_code(lambda: _main(words))


def _main(arguments: Sequence[str]) -> int:
    wants_help, wants_config, words = common.split_options(arguments)
    if wants_help:
        say(_help(words))
        return 0
    against, words = _split_against(words)
    command, source, rest = _parse(words)
    if against is not None and command != "suite":
        raise ConfigError(f"--against: not used by {command}; suite compares with another run")
    settings, origins = load_settings(source, rest, suite=command == "suite")
    _check(command, source, origins)
    if wants_config:
        say(Resolved(cast(Config, settings), origins).to_yaml().rstrip("\n"))
        return 0
    from ddp_ssl.evals import dynamics, evaluation, suite

    other = None if against is None else suite.result_of(against)
    with common.processes(settings.run) as world:
        if command == "dynamics":
            assert source.home is not None
            return dynamics.run(settings, source.home, world, source.trusted)
        if command == "suite":
            asked = settings.data.name.split(",") if "data.name" in origins else []
            return suite.run(source, settings, asked, other, world)
        evaluation.run(command, source, settings, world)
    return 0


def _split_against(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--against RUN` or `--against=RUN`, if it is given, and all other arguments."""
    against, rest, left = None, [], iter(words)
    for word in left:
        name, is_set, value = word.partition("=")
        if name != "--against":
            rest.append(word)
            continue
        against = value if is_set else next(left, "")
        if not against:
            raise ConfigError("--against: a run folder or a .json file of the suite comes after it")
    return against, rest


def _parse(arguments: list[str]) -> tuple[str, Source, list[str]]:
    trusted, words = common.split_trust(arguments)
    accepted = ", ".join(SECTIONS)
    if not words:
        raise ConfigError(f"the command is missing: one of {accepted}; --help says more")
    command, *rest = words
    if command not in SECTIONS:
        raise ConfigError(f"{command}: unknown command; accepted: {accepted}")
    # A sweep's folders are named seed=0, seed=1, ...
    if not rest or (
        "=" in rest[0] and not Path(re.sub("(:best|:last)?(:ema)?$", "", rest[0])).exists()
    ):
        raise ConfigError(
            f"{command}: the weights are missing: a run folder, RUN:best, RUN:last, a file, "
            "timm:NAME or hf-hub:USER/NAME comes after the command"
        )
    return command, find_source(rest[0], trusted), rest[1:]


def _check(command: str, source: Source, origins: Mapping[str, str]) -> None:
    """Raise `ConfigError` for what this command does not use."""
    if command == "dynamics" and source.home is None:
        raise ConfigError(f"dynamics: {source.text} is no run; a run folder would be accepted")
    if command == "dynamics" and source.average:
        raise ConfigError(f"dynamics: {source.text}: it measures the weights; leave :ema out")
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


def _help(words: Sequence[str]) -> str:
    command = words[0] if words and words[0] in SECTIONS else None
    parts = [w for w in words if w != command and common.is_part(w, EvaluateConfig.model_fields)]
    rows = [
        row
        for row in reference_of(EvaluateConfig)
        if row[0] not in OF_PRETRAINING and (command is None or _used(command, row[0]))
    ]
    rows = common.rows_of(parts, rows)
    lines = common.describe_keys(rows, lambda name: _docstring(name, command))
    return "\n".join([*([] if parts else [USAGE]), *lines]).lstrip("\n")


def _docstring(section: str, command: str | None) -> str:
    """A section's first line; "" for `eval` where the command uses its batch size only."""
    if section == "eval" and command not in (None, "dynamics"):
        return ""
    return summary(type(getattr(EvaluateConfig(), section)).__doc__)


if __name__ == "__main__":
    sys.exit(main())
