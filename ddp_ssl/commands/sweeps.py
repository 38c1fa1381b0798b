"""Lists of values in `key=a,b`: the runs of a sweep, and the way to it from `ddp-ssl train`."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence

from ddp_ssl.config import Config, ConfigError
from ddp_ssl.config.reader import kind_of
from ddp_ssl.config.text import takes_text
from ddp_ssl.driver import gpu_is_meant
from ddp_ssl.run.configure import load
from ddp_ssl.utils.launcher import local_rank_and_size


def sweep(arguments: Sequence[str]) -> list[list[str]]:
    """Every combination of the values in `key=a,b`; a comma in brackets separates no values."""
    return [list(run) for run in itertools.product(*map(_choices, arguments))]


def _choices(argument: str) -> list[str]:
    key, equals, value = argument.partition("=")
    # A config's path may hold both: a run of a sweep lies in `lr=0.1,seed=1`.
    if not equals or os.path.isfile(argument):
        return [argument]
    return [f"{key}={each}" for each in split(value)]


def split(text: str) -> list[str]:
    """Split at the commas outside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    # Quotes around a value with a comma are for this split alone: a text is taken as it is.
    return [p[1:-1] if "," in p and p[0] == p[-1] and p[0] in "'\"" else p for p in parts]


def pointer(words: Sequence[str], error: ConfigError) -> str:
    """`; one run for each value: COMMAND` if the error is a list for a key of one value.

    `words`: the arguments of `ddp_ssl.train`, which the error refuses. Empty if the key takes a
    text, which may hold a comma, or if one of the values alone would be refused too.
    """
    key = str(error).partition(":")[0]
    given = [word for word in words if word.startswith(f"{key}=")]
    values = split(given[-1].partition("=")[2]) if given else []
    resumes = any(word.startswith("run.resume=") for word in words)
    if len(values) < 2 or resumes or _is_text(key):
        return ""
    folder = [word for word in words if word.startswith("run.dir=")]
    kept = [_unsplit(word) for word in words if word not in folder]
    first = [_choices(word)[0] for word in kept]
    try:
        for value in values:
            load([*first, f"{key}={value}"])
    except ConfigError:
        return ""
    size, device = local_rank_and_size()[1], "run.device=cpu" not in words and gpu_is_meant()
    options = [f"--run-dir={word.partition('=')[2]}" for word in folder[-1:]]
    if device or size > 1:
        options += [f"--{'gpus' if device else 'tasks'}-per-node", str(size)]
    command = shlex.join(["ddp-ssl", "submit", "--cluster", "local", *options, *kept])
    return f"; one run for each value: {command}"


def _is_text(key: str) -> bool:
    return takes_text(kind_of(key.split("."), Config))


def _unsplit(word: str) -> str:
    """A text with commas in the quotes that keep it whole in a sweep."""
    key, _, value = word.partition("=")
    if not _is_text(key) or len(split(value)) == 1:
        return word
    quote = "'" if '"' in value else '"'
    return f"{key}={quote}{value}{quote}"
