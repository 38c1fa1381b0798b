"""Pretrain: `torchrun --nproc_per_node 8 -m ddp_ssl.train [CONFIG.yaml] [key=value ...]`.

Under torchrun, under srun with one task per GPU, or alone. Exit codes: 0 done or stopped on
request (status.json says which), 1 failed, 2 the config or the data cannot be used.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ddp_ssl.config import Config, ConfigError, check_world_size, load, reference
from ddp_ssl.launch import rank_and_size
from ddp_ssl.signals import StopRequest, stop_with_parent

LEAVE_WITHIN_S = 120

USAGE = """usage: torchrun --nproc_per_node N -m ddp_ssl.train [CONFIG.yaml] [key=value ...]
       python -m ddp_ssl.train [CONFIG.yaml] [key=value ...]
       ddp-ssl train [CONFIG.yaml] [key=value ...]

Without CONFIG.yaml: AdaDim on 1,797 handwritten digits, a minute or two on two cores.
  --help          this text and every key with its type and default
  --print-config  the resolved configuration and where each value came from
"""


def main(
    arguments: Sequence[str] | None = None, on_step: Callable[[Any], None] | None = None
) -> int:
    """Run from the command line; returns the exit code. `on_step` is called before every step."""
    # First of all, so that no signal is lost while torch and DALI are imported.
    stop = StopRequest().install()
    stop_with_parent()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    rank, world_size = rank_and_size()
    options = {"-h", "--help", "--print-config"} & set(arguments)
    arguments = [a for a in arguments if a not in options]
    try:
        if options & {"-h", "--help"}:
            if rank == 0:
                print(_help(arguments))
            return 0
        resolved = load(arguments)
        check_world_size(resolved.config, world_size)
        if options:
            if rank == 0:
                print(resolved.to_yaml(), end="")
            return 0
        from ddp_ssl.engine import run

        return run(resolved, stop, on_step)
    except ConfigError as error:
        if rank == 0:
            print(f"ddp_ssl: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends all ranks at the first exit; rank 0 must have spoken
        return 2


def _help(arguments: Sequence[str]) -> str:
    config = load(arguments).config
    lines = [USAGE]
    section = ""
    for key, kind, default, text in reference(type(config.method)):
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append(f"\n{section}: {(_docstring(config, section))}")
        lines.append(f"  {key}  ({kind}, default {default})\n      {text}")
    return "\n".join(lines)


def _docstring(config: Config, section: str) -> str:
    return (type(getattr(config, section)).__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    try:
        code = main()
    finally:
        # A collective that hangs, or a device, can block the interpreter's end.
        faulthandler.dump_traceback_later(LEAVE_WITHIN_S, exit=True)
    sys.exit(code)
