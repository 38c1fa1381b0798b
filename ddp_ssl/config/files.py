"""The project's configs by name: `imagenet100/adadim` is `configs/imagenet100/adadim.yaml`.

An installed package holds them inside, a checkout beside `ddp_ssl`.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import ddp_ssl
from ddp_ssl.config.section import is_url
from ddp_ssl.errors import ConfigError

_PACKAGE = Path(ddp_ssl.__file__).parent
_INSIDE = _PACKAGE / "configs"
FOLDER = _INSIDE if _INSIDE.is_dir() else _PACKAGE.parent / "configs"
PRESETS = FOLDER / "preset"
LISTS = (".csv", ".tsv", ".txt", ".lst")
ARRAYS = (".npz", ".npy")


def find_config(given: str) -> Path | None:
    """The file that a path or a name stands for; None if there is none.

    A path ending in `.yaml` or `.yml` is returned whether the file exists or not.
    """
    path = Path(given)
    # A name that no file system takes is an error for `Path.exists`, none for `os.path.exists`.
    if path.suffix in (".yaml", ".yml") or (os.path.exists(path) and not path.is_dir()):
        return path
    named = FOLDER / f"{given}.yaml"
    return named if os.path.isfile(named) else None


def with_places(arguments: Sequence[str]) -> list[str]:
    """The arguments, a folder of images as `data.root=`, a list of images as `data.files=`."""
    words: list[str] = []
    for argument in arguments:
        key = ""
        if os.path.isfile(argument) and argument.endswith(LISTS):
            key = "data.files="
        elif is_url(argument) or (os.path.isfile(argument) and argument.endswith(ARRAYS)):
            key = "data.root="
        elif os.path.isdir(argument) and find_config(argument) is None:
            key = "data.root="
            if _is_run(Path(argument)):
                raise ConfigError(
                    f"{argument}: the folder of a run; ddp-ssl resume {shlex.quote(argument)} goes "
                    "on with it"
                )
        if key and any(word.startswith(key) for word in words):
            raise ConfigError(f"{argument}: one {key[:-1]} is accepted, and one is given already")
        words.append(key + argument)
    return words


def _is_run(folder: Path) -> bool:
    config, *others = (
        os.path.exists(folder / name) for name in ("config.yaml", "checkpoints", "metrics.jsonl")
    )
    return config and any(others)


def config_names() -> list[str]:
    """Names of all configs: `cifar/adadim`, `imagenet100/ablation/alpha_0.2`, ..."""
    return sorted(map(name_of, FOLDER.rglob("*.yaml")))


def name_of(path: Path) -> str:
    """The name of one of these configs; any other path as it is."""
    inside = path.is_relative_to(FOLDER)
    return path.relative_to(FOLDER).as_posix().removesuffix(".yaml") if inside else str(path)


def unknown_config(given: str) -> str:
    """The error, in one line, for a word that is neither a path nor a name."""
    known = config_names()
    close = [n for n in known if n.endswith(f"/{given}") or n.rpartition("/")[0] == given][:3]
    close = close or difflib.get_close_matches(given, known, 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return (
        f"{given}: no such file, folder or config; accepted: CONFIG.yaml, the name of a config "
        f"such as imagenet100/adadim, a folder of images, or key=value{hint}"
    )
