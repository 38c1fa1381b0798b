"""Draw runs: `ddp-ssl plot dynamics RUN ...` or `ddp-ssl plot balance RUN|CSV ...`."""

import sys
from collections.abc import Sequence

from ddp_ssl.commands import common, plot_balance, plot_dynamics
from ddp_ssl.utils.streams import say

USAGE = """usage: ddp-ssl plot dynamics RUN [RUN ...]
       ddp-ssl plot balance RUN|CSV [RUN|CSV ...]

  dynamics  the metrics of runs over epochs
  balance   accuracy over effective rank and I(R;Z), a point a run

ddp-ssl plot dynamics --help and ddp-ssl plot balance --help say more."""
PLOTS = {"dynamics": plot_dynamics.main, "balance": plot_balance.main}


def main(arguments: Sequence[str] | None = None) -> int:
    kind, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if kind in PLOTS:
        return PLOTS[kind](rest)
    if kind in ("-h", "--help"):
        say(USAGE)
        return 0
    return common.refuse(f"plot {kind}: unknown picture; accepted: {', '.join(PLOTS)}")
