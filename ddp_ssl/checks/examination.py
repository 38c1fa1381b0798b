"""An examination: every check on all processes, a finding a line on rank 0."""

import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ddp_ssl import distributed
from ddp_ssl.checks import images, machine, network, slurm, software, storage
from ddp_ssl.checks.base import Check, Context, Finding, by_value, fail, ok
from ddp_ssl.config import Config
from ddp_ssl.distributed import World
from ddp_ssl.errors import LONGEST, cut, reason
from ddp_ssl.utils.launcher import local_rank_and_size, rank_and_size, wait_for_rank_0
from ddp_ssl.utils.streams import say
from ddp_ssl.utils.text import one_line

TIMEOUT_S = 120.0  # for a process to come, or to finish a part of a check
LONGEST_S = 1800.0  # where finding the images of a large folder takes its time


def run(config: Config, arguments: Sequence[str]) -> int:
    """Run all checks on all processes; returns the exit code."""
    rank, size = rank_and_size()
    report = Report(rank == 0)
    timeout_s = min(TIMEOUT_S, config.run.start_timeout_s)
    problem = None
    try:
        # On the CPU, whatever the run uses: a missing GPU is a finding and must not end the checks.
        world = distributed.with_timeout(distributed.start("cpu", timeout_s), LONGEST_S)
    except Exception as error:
        problem = cut(reason(error))
        if rank:
            # Rank 0 continues alone; with another exit code from here a launcher would end it.
            print(f"rank {rank} ({socket.gethostname()}): {problem}", file=sys.stderr, flush=True)
            return 0
        world = World(0, 1, *local_rank_and_size(), torch.device("cpu"))
    try:
        hosts = _everyones(world, socket.gethostname(), timeout_s)
        ctx = Context(config, arguments, world, hosts, _device(config, world), timeout_s)
        given = " ".join(arguments) or "the embedded default"
        title = f"ddp-ssl doctor: {size} process(es) on {len(set(hosts))} host(s), {given}"
        report.say(title)
        if problem is not None:
            report.add("processes", [fail(
                f"they do not find each other: {problem}",
                "MASTER_ADDR and MASTER_PORT that all can reach, and all processes started; the "
                "rest is about rank 0 alone",
            )])  # fmt: skip
        elif size > 1:
            ranks = "; ".join(f"{h}: {ctx.ranks_of(h)}" for h in dict.fromkeys(hosts))
            report.add("processes", [ok(f"all {size} answer; {ranks}")])
        for check in all_checks():
            report.add(check.name, examine(check, ctx))
        return int(world.broadcast_object(report.close()))
    except Silent as error:
        # The remaining checks need all processes; the findings so far are printed.
        report.add("processes", [fail(str(error), "see what that rank is doing: py-spy, dmesg")])
        report.close()
        wait_for_rank_0()
        return 1
    finally:
        distributed.stop()


def all_checks() -> Iterator[Check]:
    """The checks in the order of the report; some use the result of an earlier one."""
    yield storage.FOLDER
    yield from software.CHECKS
    yield from machine.CHECKS
    yield from network.CHECKS
    yield from images.CHECKS
    yield storage.CHECKPOINTS
    yield from slurm.CHECKS


def _device(config: Config, world: World) -> torch.device:
    """The device that `distributed.start` would give this process in a run."""
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place


class Silent(RuntimeError):
    """A process does not answer, so that no further check can run on all processes."""


def examine(check: Check, ctx: Context) -> list[Finding]:
    """Run a check on all processes; its findings on rank 0, nothing elsewhere.

    A check that raises on a process is a finding; the other processes do not wait for it.
    """
    limit = check.timeout_s or ctx.timeout_s
    facts: list[Any] = []
    with contextlib.ExitStack() as ctx.cleanup:
        for stage in check.stages:
            problem, fact = None, None
            try:
                fact = stage(ctx, facts)
            except Exception as error:
                problem = cut(reason(error))
            answers = _everyones(ctx.world, (problem, fact), limit)
            facts = [fact for _, fact in answers]
            problems = [problem for problem, _ in answers]
            if any(problems):
                said = by_value(problems).items()
                return [
                    fail(
                        text if len(ranks) == ctx.world.size else f"{text} [{ctx.who(ranks)}]",
                        "mend this, then look again",
                    )
                    for text, ranks in said
                    if text is not None
                ]
        if not ctx.world.is_main:
            return []
        try:
            return list(check.judge(ctx, facts))
        except Exception as error:
            return [fail(f"cannot be judged: {cut(reason(error))}", "report it, with this line")]


def _everyones(world: World, value: Any, timeout_s: float) -> list[Any]:
    """Every process's value on every process; raises `Silent` if one does not give any."""
    try:
        distributed.wait_for_all(world, timeout_s)
        values: list[Any] = world.broadcast_object(world.gather_objects(value))
    except RuntimeError as error:
        said = str(error).partition("]: ")[2] or str(error)
        raise Silent(f"no answer: {one_line(said, LONGEST)}") from None
    return values


class Report:
    """Prints findings as they come, on rank 0."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self.counts = {"ok": 0, "warn": 0, "fail": 0}

    def add(self, name: str, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self.counts[finding.level] += 1
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            line = f"{finding.level:<6}{name:<14}{finding.text}{remedy}"
            self.say(" ".join(line.splitlines()))

    def close(self) -> int:
        """Print the number of findings of each level; returns the exit code."""
        counts = self.counts
        self.say(f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail")
        return int(counts["fail"] > 0)

    def say(self, line: str) -> None:
        if self.speaks:
            say(line)
