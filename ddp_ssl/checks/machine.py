"""GPUs, cores, shared memory and limits of every host."""

import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ddp_ssl.checks.base import Check, Context, Finding, Findings, by_value, fail, ok, size, warn
from ddp_ssl.driver import why_no_gpu
from ddp_ssl.utils.files import if_readable
from ddp_ssl.utils.launcher import cpu_share
from ddp_ssl.utils.programs import output_of

IN_USE = 2 << 30  # bytes in use on a GPU that this process alone does not explain
SHM = Path("/dev/shm")
SHM_WANTED = 1 << 30
SLOWER = 1.3  # times the median for the same computation


def look_at_gpu(ctx: Context, before: list[Any]) -> dict[str, Any] | str | None:
    """This process's GPU; why it is missing; or None if the run uses none."""
    if ctx.device.type != "cuda":
        return why_no_gpu(torch.__version__, torch.version.cuda)
    properties = torch.cuda.get_device_properties(ctx.device)
    others = _others_on(str(properties.uuid))  # before this process is there itself
    free, total = torch.cuda.mem_get_info(ctx.device)
    return {
        "id": f"{ctx.hosts[ctx.world.rank]} {properties.uuid}",
        "name": properties.name,
        "free": free,
        "total": total,
        "others": others,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "far": _far_from_cores(properties),
    }


def _others_on(uuid: str) -> list[str]:
    """Processes on a GPU as nvidia-smi sees them (in a container it may see none)."""
    command = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory",
               "--format=csv,noheader"]  # fmt: skip
    told = if_readable(lambda: output_of(command, timeout_s=30)) or ""
    rows = [line.split(", ") for line in told.splitlines() if uuid in line]
    return [" ".join(row[1:]) for row in rows if row[1] != str(os.getpid())]


def _far_from_cores(properties: Any) -> str | None:
    """Why this process's cores are far from its GPU; None if they are near, or unknown."""
    if not hasattr(properties, "pci_bus_id"):
        return None
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:"
    address += f"{properties.pci_device_id:02x}.0"
    try:
        node = Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text().strip()
        listed = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
    except OSError:
        return None
    near = set[int]()
    for part in listed.split(","):
        first, _, last = part.partition("-")
        near |= set(range(int(first), int(last or first) + 1))
    if near & os.sched_getaffinity(0):
        return None
    return f"its cores are all outside of the GPU's NUMA node {node} (cores {listed})"


def judge_gpus(ctx: Context, facts: list[dict[str, Any] | str | None]) -> Findings:
    wanted = ctx.config.run.device
    gpus = {rank: fact for rank, fact in enumerate(facts) if isinstance(fact, dict)}
    without = [rank for rank in range(len(facts)) if rank not in gpus]
    missing = next((fact for fact in facts if isinstance(fact, str)), None)
    if wanted == "cpu":
        yield ok("run.device=cpu: none is used")
        return
    if without and (gpus or missing or wanted == "cuda"):
        remedy = missing or "sbatch --gpus-per-node, CUDA_VISIBLE_DEVICES, or run.device=cpu"
        yield fail(f"{ctx.who(without)} found no GPU", remedy)
    if not gpus:
        if wanted != "cuda" and not missing:
            yield ok("no GPU: the run would use the CPU")
        return
    found: list[Finding] = []
    for ranks in by_value([f["id"] if isinstance(f, dict) else None for f in facts]).values():
        if ranks[0] in gpus and len(ranks) > 1:
            text = f"{ctx.who(ranks)} share one GPU"
            found.append(fail(text, "one process per GPU: --ntasks-per-node, --nproc_per_node"))
    if ctx.config.optim.precision == "bf16":
        ranks = [rank for rank, gpu in gpus.items() if not gpu["bf16"]]
        if ranks:
            text = f"{ctx.who(ranks)}: the GPU has no bf16"
            found.append(fail(text, "optim.precision=fp16 or fp32"))
    for rank, gpu in gpus.items():
        used = gpu["total"] - gpu["free"]
        if used > IN_USE or gpu["others"]:
            names = f" ({'; '.join(gpu['others'][:3])})" if gpu["others"] else ""
            text = f"{ctx.who([rank])}: {size(used)} of the GPU are in use already{names}"
            found.append(warn(text, "end the other processes, or take another GPU"))
        if gpu["far"]:
            found.append(warn(f"{ctx.who([rank])}: {gpu['far']}", "srun --cpu-bind, --gpu-bind"))
    names_of = by_value([gpu["name"] for gpu in gpus.values()])
    if len(names_of) > 1:
        text = f"different GPUs ({', '.join(names_of)})"
        found.append(warn(text, "the slowest sets the pace; sbatch --constraint chooses"))
    yield from found
    if not found and not without:
        free = min(gpu["free"] for gpu in gpus.values())
        yield ok(f"{len(gpus)} x {next(iter(names_of))}, each rank one, {size(free)} free or more")


def look_at_speed(ctx: Context, before: list[Any]) -> float:
    """Milliseconds of a matrix product, the fastest of several."""
    side, count = (4096, 20) if ctx.device.type == "cuda" else (256, 20)
    a = torch.ones(side, side, device=ctx.device)
    best = float("inf")
    for _ in range(count):
        start = time.perf_counter()
        a @ a
        if ctx.device.type == "cuda":
            torch.cuda.synchronize(ctx.device)
        best = min(best, time.perf_counter() - start)
    return best * 1000


def judge_speed(ctx: Context, facts: list[float]) -> Findings:
    median = statistics.median(facts)
    slow = [rank for rank, ms in enumerate(facts) if ms > SLOWER * median]
    if slow:
        worst = max(slow, key=facts.__getitem__)
        yield warn(
            f"{ctx.who(slow)} need up to {facts[worst] / median:.1f} times as long as the "
            f"others for the same matrix product ({facts[worst]:.2g} ms)",
            "another job there, a hot GPU (nvidia-smi -q -d PERFORMANCE) or too few cores",
        )
    else:
        yield ok(
            f"the same matrix product takes {min(facts):.2g} to {max(facts):.2g} ms everywhere"
        )


def look_at_cores(ctx: Context, before: list[Any]) -> dict[str, Any]:
    """The cores that this process may use, and its number of threads."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return {
        "cores": cores,
        "share": cpu_share(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "threads": ctx.config.run.threads or cpu_share(),
        "quota": cpu_quota(),
        "numa": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
    }


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Number of cores that the container's CPU quota allows; None without a quota."""

    def read() -> float:
        quota, period = map(int, path.read_text().split())
        return quota / period

    return if_readable(read)  # `max` is no number: there is no quota


def judge_cores(ctx: Context, facts: list[dict[str, Any]]) -> Findings:
    found: list[Finding] = []
    hosts = by_value(ctx.hosts)
    unset = [r for ranks in hosts.values() if len(ranks) > 1 for r in ranks if not facts[r]["omp"]]
    if unset:
        text = f"OMP_NUM_THREADS is unset with several processes on a host ({ctx.who(unset)})"
        found.append(warn(text, f"export OMP_NUM_THREADS={facts[unset[0]]['share']}"))
    for host, ranks in hosts.items():
        cores = set().union(*(facts[r]["cores"] for r in ranks))
        if len(cores) < len(ranks):
            text = f"{len(ranks)} processes on {host} share {len(cores)} core(s)"
            found.append(warn(text, "sbatch --cpus-per-task, and SRUN_CPUS_PER_TASK; or fewer"))
        threads = sum(facts[r]["threads"] for r in ranks)
        if ctx.config.run.threads and threads > len(cores):
            text = f"run.threads asks for {threads} threads on the {len(cores)} cores of {host}"
            found.append(warn(text, "run.threads=0 shares the cores"))
        quota = facts[ranks[0]]["quota"]
        if quota is not None and quota < 0.9 * len(cores):
            text = f"the container on {host} may use {quota:g} cores' time, but sees {len(cores)}"
            found.append(warn(text, "raise its CPU limit, or data.threads and run.threads to fit"))
        few = [r for r in ranks if ctx.device.type == "cuda" and facts[r]["share"] < 4]
        if few:
            text = f"{facts[few[0]]['share']} core(s) per GPU on {host} rarely feed it"
            found.append(warn(text, "sbatch --cpus-per-task=8 or more"))
    yield from found
    if not found:
        fact = facts[0]
        nodes = f", {fact['numa']} NUMA nodes" if fact["numa"] > 1 else ""
        yield ok(
            f"{min(f['share'] for f in facts)} core(s) per process{nodes}; "
            f"OMP_NUM_THREADS {fact['omp'] or 'unset'}, run.threads {fact['threads']}"
        )


def look_at_limits(ctx: Context, before: list[Any]) -> dict[str, Any]:
    """Shared memory and open files."""
    shm = os.statvfs(SHM)
    return {
        "shm": shm.f_blocks * shm.f_frsize,
        "shm_free": shm.f_bavail * shm.f_frsize,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def judge_shm(ctx: Context, facts: list[dict[str, Any]]) -> Findings:
    small = [
        rank
        for rank in ctx.one_per_host
        if facts[rank]["shm"] < SHM_WANTED or facts[rank]["shm_free"] < SHM_WANTED // 4
    ]
    if small:
        fact = facts[small[0]]
        yield warn(
            f"{size(fact['shm_free'])} of {size(fact['shm'])} are free on "
            f"{ctx.hosts[small[0]]}; NCCL talks through it within a host",
            "docker run --shm-size=8g; ls /dev/shm shows what fills it",
        )
    else:
        least = min(facts[rank]["shm_free"] for rank in ctx.one_per_host)
        yield ok(f"{size(least)} free or more")


def judge_files(ctx: Context, facts: list[dict[str, Any]]) -> Findings:
    # Every process has sockets to all others, in several groups, and files that it reads ahead.
    wanted = 512 + 8 * ctx.world.size + 4 * ctx.config.data.readers
    low = [r for r, f in enumerate(facts) if 0 <= f["files"] < wanted]
    if low:
        text = f"{ctx.who(low)} may open {facts[low[0]]['files']} files, about {wanted} are used"
        yield warn(text, "ulimit -n 65536 in the job script")
    else:
        yield ok(f"{min(f['files'] for f in facts)} may be open, about {wanted} are used")


CHECKS = (
    Check("gpus", (look_at_gpu,), judge_gpus),
    Check("cores", (look_at_cores,), judge_cores),
    Check("/dev/shm", (look_at_limits,), judge_shm),
    Check("open files", (look_at_limits,), judge_files),
    Check("speed", (look_at_speed,), judge_speed),
)
