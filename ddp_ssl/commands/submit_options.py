"""The options of `python -m ddp_ssl.submit`, and those of them that an evaluation's job takes."""

import argparse
import os
from collections.abc import Sequence

from ddp_ssl.commands import common
from ddp_ssl.config import ConfigError
from ddp_ssl.utils.programs import slurm_seconds


def parser() -> argparse.ArgumentParser:
    """The command line's options; what cannot be parsed raises `ConfigError`."""
    made = common.Parser(
        "ddp-ssl submit",
        "Submit a run, or a sweep, through submitit.",
        "key=a,b,c is a sweep: a run for each value, or each combination of several.",
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
    """Minutes in a time as sbatch takes it, rounded up."""
    try:
        seconds = slurm_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all")
    return -(-seconds // 60)
