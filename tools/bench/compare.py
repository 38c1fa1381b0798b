"""Shared by the benchmarks: contestants in turn within one process, and their tables."""

import argparse
import gc
import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ddp_ssl.comm import Comm

Work = Callable[[], object]


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it stands."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OneOf(Comm):
    """The shapes of one process of W; the others' rows are copies of its own."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def gather(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.world_size, *(1 for _ in x.shape[2:]))

    def sum(self, x: Tensor) -> Tensor:
        return x * self.world_size


def seconds(work: Work, device: torch.device) -> float:
    """Time of one call: of this process's processors on a CPU, by the device's clock on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3
    begin = time.process_time()
    work()
    return time.process_time() - begin


def in_turn(
    contestants: Mapping[str, Work], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each in `repeats` rounds; the order changes, and one round warms up."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            value = 1e3 * seconds(contestants[name], device)
            if turn:
                times[name].append(value)
    return times


def peak_mib(work: Work, device: torch.device) -> float:
    """Most memory in use at once during one call, beyond what was in use before, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        work()
    used = peak = 0
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    return peak / 2**20


def spread(values: list[float], digits: int = 1) -> str:
    """`median (min to max)`."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


ENOUGH = 6  # of fewer values no two enclose the median in 95 % of cases


def verdict(ours: list[float], theirs: list[float]) -> str:
    """The other's time over ours in the same round: the median and its interval.

    Rounds are compared one by one, since other work slows both. There is no verdict where the
    interval holds 1, or below six rounds.
    """
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, high = interval(ratios)
    undecided = ": undecided" if low <= 1 <= high or len(ratios) < ENOUGH else ""
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}{undecided})"


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median of independent values, of any distribution.

    Its ends are two of the values. Below six values it is the whole range, which is less sure.
    """
    count, left_out = len(values), 0
    outside = 1  # of the 2^count equally likely splits about the median, those beyond one end
    while 40 * (outside := outside + math.comb(count, left_out + 1)) <= 2**count:
        left_out += 1
    ordered = sorted(values)
    return ordered[left_out], ordered[-1 - left_out]


def where(values: list[float], digits: int) -> str:
    """The interval in words."""
    if len(values) < ENOUGH:
        return f"too few for an interval ({ENOUGH} would do)"
    low, high = interval(values)
    return f"with 95 % between {low:.{digits}f} and {high:.{digits}f}"


def table(
    times: Mapping[str, list[float]], memory: Mapping[str, float], unit: str, ours: str
) -> str:
    """Markdown: a line per contestant, each against `ours`."""
    lines = [
        f"| | {unit}, median (range) | times ours | peak MiB | times ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in times.items():
        ratio = "1" if name == ours else verdict(times[ours], values)
        share = f"{memory[name] / memory[ours]:.1f}"
        lines.append(f"| {name} | {spread(values)} | {ratio} | {memory[name]:.0f} | {share} |")
    return "\n".join(lines)


def device_line(device: torch.device) -> str:
    """Device, threads and versions of this benchmark."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
