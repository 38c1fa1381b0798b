"""The environment of the launcher: torchrun, srun with one task per GPU, or neither."""

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path


def under_srun() -> bool:
    """Whether srun started this process as one task of several (a batch script itself is not)."""
    return "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rank_and_size() -> tuple[int, int]:
    """(rank, world size), (0, 1) without a launcher. Raises `ValueError` for other text."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = env["RANK"], env["WORLD_SIZE"]
        if rank.isdigit() and size.isdigit() and int(rank) < int(size):
            return int(rank), int(size)
        raise ValueError(
            f"RANK, WORLD_SIZE: {rank!r} and {size!r} given; numbers as torchrun sets them, from 0 "
            "to WORLD_SIZE - 1 and from 1, are accepted, or neither of the two"
        )
    if under_srun():
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    return 0, 1


def wait_for_rank_0() -> None:
    """Wait on all ranks but rank 0: the launcher ends all of them when the first one exits."""
    if rank_and_size()[0]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends this wait too
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


BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # flags of a CPU that computes with it


def has_bf16(place: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU has instructions for bfloat16. Emulated it is far slower."""
    try:
        lines = place.read_text(errors="replace").splitlines()
    except OSError:
        return False
    flags = next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
    return bool({*BF16} & {*flags.split()})


def visible_gpus() -> list[str]:
    """Names of the GPUs as `CUDA_VISIBLE_DEVICES` has them; imports torch where it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


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


def job_name() -> str | None:
    """A name of this job that its restarts share: Slurm's, or torchrun's run id on several nodes.

    Other launchers name a start and no job.
    """
    env = os.environ
    job = env.get("SLURM_ARRAY_JOB_ID") or env.get("SLURM_JOB_ID")
    if job:
        task = env.get("SLURM_ARRAY_TASK_ID")
        return f"job{job}" + ("" if task is None else f"_{task}")
    launch = env.get("TORCHELASTIC_RUN_ID", "none")
    several = int(env.get("GROUP_WORLD_SIZE", "1")) > 1  # rank 0 may move to another node
    return launch if several and launch not in ("", "none") else None


def resume_command(folder: str) -> str:
    """The command that goes on with the run in a folder, with as many processes as there are now.

    It is meant for the shell in which this run was started.
    """
    env, size, place = os.environ, rank_and_size()[1], shlex.quote(folder)
    here = Path(sys.executable).parent
    python = "python" if _is_found("python", here) else shlex.quote(sys.executable)
    script = Path(__file__).parents[2] / "slurm/resume.sh"
    if under_srun() and not script.is_file():
        return f"srun --ntasks={size} {python} -m ddp_ssl.resume {place}"
    if "SLURM_JOB_ID" in env and script.is_file():
        gpus = env.get("SLURM_GPUS_ON_NODE")
        what = (
            f"--gpus-per-node={gpus}" if gpus else f"--ntasks-per-node={local_rank_and_size()[1]}"
        )
        nodes = f"--nodes={env.get('SLURM_JOB_NUM_NODES', '1')}"
        return f"sbatch {nodes} {what} {shlex.quote(str(script))} {place}"
    if size == 1:
        script = Path(sys.argv[0])
        if script.name == "ddp-ssl":
            named = "ddp-ssl" if _is_found("ddp-ssl", here) else shlex.quote(str(script))
            return f"{named} resume {place}"
        return f"{python} -m ddp_ssl.resume {place}"
    own = _is_found("torchrun", here)
    launcher = "torchrun" if own else f"{python} -m torch.distributed.run"
    local, hosts = local_rank_and_size()[1], int(env.get("GROUP_WORLD_SIZE", "1"))
    where = "--standalone"
    if hosts > 1:
        where = f"--nnodes {hosts} --rdzv-backend c10d --rdzv-endpoint {env['MASTER_ADDR']}:29400"
    return f"{launcher} {where} --nproc_per_node {local} -m ddp_ssl.resume {place}"


def _is_found(program: str, folder: Path) -> bool:
    """Whether the shell finds this program in this folder."""
    return shutil.which(program) == str(folder / program)


def job_end() -> float | None:
    """When Slurm will end this job, in seconds since 1970; None if that is unknown."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def restarts() -> int:
    """Number of restarts of this job by torchrun and Slurm."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return sum(int(os.environ.get(name) or 0) for name in counts)
