"""Pretrain: `torchrun --nproc_per_node 8 -m ddp_ssl.train [CONFIG.yaml] [key=value ...]`.

Under torchrun, under srun with one task per GPU, or alone. Exit codes: 0 done or stopped on
request (status.json says which), 1 failed, 2 the config or the data cannot be used.
"""

import faulthandler
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ddp_ssl.commands import common
from ddp_ssl.commands.sweeps import pointer
from ddp_ssl.config import Config, ConfigError, check_folder, check_world_size, reference
from ddp_ssl.run.configure import load
from ddp_ssl.run.signals import StopRequest, stop_with_parent
from ddp_ssl.utils import hub
from ddp_ssl.utils.launcher import rank_and_size
from ddp_ssl.utils.streams import open_streams, say
from ddp_ssl.utils.text import summary

LEAVE_WITHIN_S = 120

USAGE = """usage: torchrun --nproc_per_node N -m ddp_ssl.train [CONFIG] [key=value ...]
       python -m ddp_ssl.train [CONFIG] [key=value ...]
       ddp-ssl train [CONFIG] [key=value ...]

CONFIG: a YAML file, or the name of one of the project's configs, such as
imagenet100/adadim. Or a folder of images, or a list of them: a preset and what
fits their number and this machine. Without CONFIG and images: AdaDim on 1,797
handwritten digits, a minute or two on two cores.
  --help          this text and every key with its type and default
  --help SECTION  the keys of one section, such as optim, or one key
  --print-config  the resolved configuration and where each value came from
"""


def main(
    arguments: Sequence[str] | None = None, on_step: Callable[[Any], None] | None = None
) -> int:
    """Run from the command line; returns the exit code. `on_step` is called before every step."""
    open_streams()
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # stderr: a crash in native code leaves a stack
    # Before all imports, so that no signal is lost while torch and DALI are imported.
    stop = StopRequest().install()
    stop_with_parent()
    words = sys.argv[1:] if arguments is None else arguments
    return common.exit_code(lambda: _main(words, stop, on_step))


def _main(words: Sequence[str], stop: StopRequest, on_step: Callable[[Any], None] | None) -> int:
    wants_help, wants_config, arguments = common.split_options(words)
    if wants_help:
        say(_help(arguments))
        return 0
    try:
        resolved = load(arguments)
    except ConfigError as error:
        if more := pointer(arguments, error):
            raise ConfigError(f"{error}{more}") from None
        raise
    check_world_size(resolved.config, rank_and_size()[1])
    check_folder(resolved.config)
    if wants_config:
        say(resolved.to_yaml().rstrip("\n"))
        return 0
    if rank_and_size()[1] == 1:  # several processes find the data together, in `training/build.py`
        common.check_data(resolved.config.data)
    place = str(resolved.config.model.backbone_args.get("pretrained"))
    if place.startswith(hub.PREFIX) and resolved.config.run.resume != "auto":
        hub.require(place)  # a run that goes on has its weights
    for note in resolved.notes:
        say(note)
    from ddp_ssl.training.lifecycle import run

    return run(resolved, stop, on_step)


def _help(arguments: Sequence[str]) -> str:
    parts = [word for word in arguments if common.is_part(word, Config.model_fields)]
    rest = [word for word in arguments if word not in parts]
    config = Config()
    if not parts or rest or any(part.startswith("method") for part in parts):
        config = load(rest).config  # imports torch for the method's own keys
    rows = common.rows_of(parts, reference(type(config.method)))
    lines = common.describe_keys(rows, lambda name: summary(type(getattr(config, name)).__doc__))
    return "\n".join([*([] if parts else [USAGE]), *lines]).lstrip("\n")


def leave(command: Callable[[], int]) -> NoReturn:
    """Run a command as a process of its own, and end the process with its exit code."""
    try:
        code = command()
    finally:
        # A collective that hangs, or a device, can block the interpreter's end.
        faulthandler.dump_traceback_later(LEAVE_WITHIN_S, exit=True)
    sys.exit(code)


if __name__ == "__main__":
    leave(main)
