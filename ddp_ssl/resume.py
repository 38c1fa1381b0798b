"""Go on with a run: `ddp-ssl resume RUN [key=value ...]`, with the config that lies in its folder.

Under torchrun and srun `-m ddp_ssl.resume RUN` takes the place of `-m ddp_ssl.train CONFIG ...`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddp_ssl import train
from ddp_ssl.commands import common
from ddp_ssl.config import Config, ConfigError, read_yaml
from ddp_ssl.config.text import flow
from ddp_ssl.run.configure import check_inside, check_recipes, check_trust
from ddp_ssl.utils.files import json_file
from ddp_ssl.utils.streams import say

USAGE = """usage: ddp-ssl resume RUN [key=value ...]
       torchrun --nproc_per_node N -m ddp_ssl.resume RUN [key=value ...]

RUN: the folder of a run. Its config.yaml is used, and it goes on after its
newest good checkpoint. key=value changes what may change when a run goes on,
such as eval.every or data.root.
  --help          this text
  --print-config  the resolved configuration and where each value came from
  --trust         let the run import a method, loggers and recipes from outside
                  this package (module:Class)
"""
# Paths of a config. A relative one is meant from where the run was started.
PATHS = {"run": ("init_from",), "data": ("root", "files", "val_files", "skip", "stage")}


def main(
    arguments: Sequence[str] | None = None, on_step: Callable[[Any], None] | None = None
) -> int:
    """Go on from the command line; returns the exit code. `on_step` is called before every step."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return common.exit_code(lambda: _main(words, on_step))


def _main(words: Sequence[str], on_step: Callable[[Any], None] | None) -> int:
    if {"-h", "--help"} & set(words):
        say(USAGE.rstrip())
        return 0
    return train.main(arguments_of(words), on_step)


def arguments_of(words: Sequence[str]) -> list[str]:
    """The arguments with which `ddp_ssl.train` goes on; raises `ConfigError`."""
    trusted, words = common.split_trust(words)
    places = [word for word in words if not word.startswith("-") and _is_place(word)]
    rest = [word for word in words if word not in places]
    if len(places) != 1:
        raise ConfigError(f"resume: one folder of a run is expected, got {len(places)}")
    folder, config = Path(places[0]), Path(places[0]) / "config.yaml"
    if not config.is_file():
        what = "has no config.yaml" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"resume: {folder} {what}; the folder of a run would be accepted")
    for word in rest:
        if word.partition("=")[0] in ("run.dir", "run.resume"):
            raise ConfigError(
                f"{word}: ddp-ssl resume goes on in {folder}; ddp-ssl train with run.init_from="
                f"{folder} starts another run from its weights"
            )
    method = read_yaml(config).get("method")
    name = str(method.get("name", "")) if isinstance(method, dict) else ""
    check_trust(name, trusted)  # the folder may be anybody's
    given = any(word.startswith(("log.to=", "log.tensorboard=")) for word in rest)
    if not given and trusted != "*":
        log = read_yaml(config, Config).get("log")
        to = log.get("to") if isinstance(log, dict) else None
        names = [str(name) for name in to] if isinstance(to, list) else []
        check_inside("log.to", names, f"'log.to=[{', '.join(names)}]'")
    data = read_yaml(config, Config).get("data")
    views = data.get("views") if isinstance(data, dict) else None
    groups = views if isinstance(views, list) else []
    check_recipes([str(g.get("recipe")) for g in groups if isinstance(g, dict)], trusted)
    consent = [f"method.name={name}"] if ":" in name else []
    # A run that began with the weights of another one goes on with its own.
    own = [f"run.dir={folder}", "run.resume=auto", "run.init_from="]
    return [str(config), *_absolute(config), *own, *consent, *rest]


def _is_place(word: str) -> bool:
    return "=" not in word or os.path.isdir(word)  # folders of a sweep are called `seed=0`


def _absolute(config: Path) -> list[str]:
    """`key=value` for the config's relative paths, from where the run was started."""
    start = json_file(config.parent / "environment.json").get("cwd")
    if not isinstance(start, str):  # of an earlier version, or damaged
        return []
    tree = read_yaml(config, Config)
    found = []
    for section, keys in PATHS.items():
        values = tree.get(section) or {}
        for key in keys:
            given = values.get(key) if isinstance(values, dict) else None
            paths = given if isinstance(given, list) else [given] if given else []
            if not all(map(os.path.isabs, paths)) and os.getcwd() != start:
                whole = [os.path.join(start, path) for path in paths]
                found.append(f"{section}.{key}={flow(whole) if given is paths else whole[0]}")
    return found


if __name__ == "__main__":
    train.leave(main)
