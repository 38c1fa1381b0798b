"""The options of `python -m ddp_ssl.submit`, and those of them that an evaluation's job takes."""

import argparse
import os
from collections.abc import Sequence

from ddp_ssl.commands import common
from ddp_ssl.config import ConfigError


def parser() -> argparse.ArgumentParser:
    """The command line's options; what cannot be parsed raises `ConfigError`."""
    made = common.Parser(
        prog="ddp-ssl submit",
        description="Submit a run, or a sweep, through submitit.",
        epilog="key=a,b,c is a sweep: one run for each value, and for each combination of several.",
    )
    add = made.add_argument
    add("arguments", nargs="*", metavar="CONFIG key=value", help="as for ddp_ssl.train")
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm",
        help="slurm; local: processes on this machine; debug: this process")  # fmt: skip
    add("--nodes", type=common.count, default=1)
    add("--gpus-per-node", type=common.count, help="as many processes on each node")
    add("--tasks-per-node", type=common.count, help="processes on each node, for runs on the CPU")
    add("--cpus-per-task", type=common.count, help="CPUs for each process")
    add("--partition")
    add("--account")
    add("--time", type=_minutes, default=24 * 60, help="as sbatch's (default 24:00:00)")
    add("--run-dir", type=os.path.expanduser,
        help="run folder (default runs/NAME-JOB); an older one is continued")  # fmt: skip
    add("--max-requeues", type=int, default=20, help="starts after the first (default 20)")
    add("--parallel", type=common.count,
        help="runs of a sweep at the same time (local: default 1)")  # fmt: skip
    add("--wait", action="store_true",
        help="slurm: show a line for each run until all have ended")  # fmt: skip
    add("--sbatch", type=_pair, action="append", default=[], metavar="KEY=VALUE",
        help="a further argument of sbatch, such as qos=high; may be repeated")  # fmt: skip
    return made


def for_evaluation(options: Sequence[str]) -> list[str]:
    """Options of `ddp_ssl.submit` as sbatch's, for an evaluation: one process, one GPU if any.

    Raises `ConfigError` for an option that `ddp_ssl.submit` does not know.
    """
    known = parser()
    known.exit_on_error = False
    try:
        given, unknown = known.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise ConfigError(f"--submit: {error}") from None
    unknown += given.arguments
    if unknown:
        raise ConfigError(
            f"--submit: {unknown[0]} is no option of ddp-ssl submit, whose --help lists "
            "them; key=value for every run stands outside --submit"
        )
    words = {
        "gpus-per-node": 1 if given.gpus_per_node else None,
        "cpus-per-task": given.cpus_per_task,
        "partition": given.partition,
        "account": given.account,
        "time": given.time,
    }
    words |= dict(given.sbatch)  # an option given by the user, such as gres, wins
    return [f"--{name}={value}" for name, value in words.items() if value is not None]


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.lstrip("-").partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _minutes(text: str) -> int:
    """Minutes in a time as sbatch writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; rounded up."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts + ([days] if dash else [])) or len(parts) > 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 24:00:00 or 2-12:00:00")
    numbers = [int(part) for part in parts]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = ([*numbers, 0, 0])[:3]
    else:
        hours, (minutes, seconds) = 0, ([*numbers, 0])[:2]
    total = (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds
    if not total:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all")
    return -(-total // 60)
