"""The environment of the launcher: torchrun, srun with one task per GPU, or neither."""

import os
import time
from collections.abc import Iterable


def under_srun() -> bool:
    """Whether srun started this process as one task of several (a batch script itself is not)."""
    return "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rank_and_size() -> tuple[int, int]:
    """(rank, world size), (0, 1) without a launcher."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if under_srun():
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    return 0, 1


def wait_for_rank_0() -> None:
    """Wait on all ranks but rank 0: the launcher ends all of them when the first one exits."""
    if rank_and_size()[0]:
        time.sleep(3)


def local_rank_and_size() -> tuple[int, int]:
    """(rank, number of processes) on this machine."""
    env = os.environ
    if under_srun():
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
        return int(env["SLURM_LOCALID"]), int(per_node)
    return int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", "1"))


def cpu_share() -> int:
    """Cores that this process may use: its share of the machine's, or those of its Slurm task."""
    cores = len(os.sched_getaffinity(0))
    if under_srun() and "SLURM_CPUS_PER_TASK" in os.environ:
        return max(1, min(cores, int(os.environ["SLURM_CPUS_PER_TASK"])))
    return max(1, cores // local_rank_and_size()[1])


def has_bf16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16; true where that is unknown."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((f for f in file if f.startswith(("flags", "Features"))), "bf16")
    except OSError:
        return True
    return "bf16" in flags


def ranges(numbers: Iterable[int]) -> str:
    """`{0, 1, 2, 5}` as `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in parts)


def layout_lines(ranks: list[str]) -> list[str]:
    """The places of `distributed.layout`, a line per host: `n1: rank 0 cpu cpus 0-1`."""
    hosts: dict[str, list[str]] = {}
    for rank, text in enumerate(ranks):
        host, _, place = text.partition(" ")
        hosts.setdefault(host, []).append(f"rank {rank} {place}")
    return [f"{host}: {', '.join(places)}" for host, places in hosts.items()]


def job_end() -> float | None:
    """When Slurm will end this job, in seconds since 1970; None if that is unknown."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def restarts() -> int:
    """Number of restarts of this job by torchrun and Slurm."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return sum(int(os.environ.get(name) or 0) for name in counts)
