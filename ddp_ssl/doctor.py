"""Check the machine before a long run: `ddp-ssl doctor [CONFIG.yaml] [key=value ...]`.

Under torchrun, under srun with one task per GPU, or alone. Every process runs the checks; rank 0
prints a line per finding. Exit codes: 0 nothing failed, 1 something did, 2 the config cannot be
used.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ddp_ssl.checks import examination
from ddp_ssl.commands import common
from ddp_ssl.config import check_world_size
from ddp_ssl.run.configure import load
from ddp_ssl.utils.launcher import rank_and_size
from ddp_ssl.utils.streams import say

USAGE = """usage: ddp-ssl doctor [CONFIG.yaml] [key=value ...]
       torchrun --nproc_per_node N -m ddp_ssl.doctor [CONFIG.yaml] [key=value]
       srun python -m ddp_ssl.doctor [CONFIG.yaml] [key=value ...]

Checks, in about a minute, what a long run with this config would depend on:
versions, GPUs, cores, all-reduce, clocks, disk, data, Slurm. Start it as you
start the run. A line per finding:

  ok    as it should be
  warn  the run would start, and be slow, or be lost at some event
  fail  the run would not start, or end badly

Exit code: 0 nothing failed, 1 something did, 2 the config cannot be used.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    return common.exit_code(lambda: _main(words))


def _main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        say(USAGE.rstrip("\n"))
        return 0
    config = load(arguments).config
    check_world_size(config, rank_and_size()[1])
    with _ending_in_order():
        return examination.run(config, arguments)


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM raises `SystemExit`, so that temporary files are removed."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
