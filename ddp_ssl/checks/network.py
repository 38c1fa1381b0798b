"""Communication between the processes, and their clocks."""

import os
import statistics
import time
from typing import Any

import torch

from ddp_ssl import distributed
from ddp_ssl.checks.base import Check, Context, Findings, by_value, fail, ok, scratch, size, warn

NBYTES = 64 << 20
SLOW_NCCL = {"one host": 5e9, "several": 2e9}  # bytes/s of bus bandwidth; less is a warning
APART_S = 2.0  # clocks
PAUSES = (0.1, 1.0, 4.0)  # s; a network file system may remember that a file was missing


def ready(ctx: Context, before: list[Any]) -> str:
    """The device that this process communicates from."""
    if ctx.device.type == "cpu":
        return "cpu"
    return f"{ctx.hosts[ctx.world.rank]} {torch.cuda.get_device_properties(ctx.device).uuid}"


def exchange(ctx: Context, before: list[Any]) -> distributed.Exchange | None:
    """The measured all-reduce; None for one process, and where GPUs are missing or shared."""
    if ctx.world.size == 1 or not _can_talk(before):
        return None
    # A collective that fails raises here; otherwise NCCL's watchdog would end the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    return distributed.measure_bandwidth(ctx.world, ctx.device, NBYTES, ctx.timeout_s / 2)


def _can_talk(places: list[str]) -> bool:
    return set(places) == {"cpu"} or ("cpu" not in places and len(set(places)) == len(places))


def judge_exchange(ctx: Context, facts: list[distributed.Exchange | None]) -> Findings:
    measured = [fact for fact in facts if fact is not None]
    if ctx.world.size == 1:
        yield ok("one process: nothing to talk about")
        return
    if len(measured) < len(facts):
        yield fail("not tried: some processes have no GPU of their own", "see the line of the gpus")
        return
    wrong = [rank for rank, fact in enumerate(measured) if not fact.correct]
    if wrong:
        yield fail(f"{ctx.who(wrong)} got a wrong sum", "a broken network, NCCL or memory")
        return
    seconds = max(fact.seconds for fact in measured)
    latency = max(fact.latency for fact in measured)
    nbytes, backend, several = measured[0].nbytes, measured[0].backend, len(set(ctx.hosts)) > 1
    algorithm = nbytes / seconds
    bus = algorithm * 2 * (ctx.world.size - 1) / ctx.world.size
    text = (
        f"{backend}, {ctx.world.size} processes on {len(set(ctx.hosts))} host(s): "
        f"{size(nbytes)} in {seconds * 1000:.3g} ms, {algorithm / 1e9:.3g} GB/s "
        f"(bus {bus / 1e9:.3g} GB/s), latency {latency * 1e6:.0f} us, sums right"
    )
    if backend == "nccl" and bus < SLOW_NCCL["several" if several else "one host"]:
        yield warn(text + ": slow", "NCCL_DEBUG=INFO says what it uses; NCCL_SOCKET_IFNAME chooses")
    else:
        yield ok(text)
    yield from _slow_links(ctx, measured)


def _slow_links(ctx: Context, measured: list[distributed.Exchange]) -> Findings:
    """Links slower than the others of their kind: within a host, or between hosts."""
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for rank in range(len(measured)):
        kinds[ctx.hosts[rank] == ctx.hosts[rank - 1]].append(rank)
    for within, ranks in kinds.items():
        if len(ranks) < 2 or (within and measured[0].backend == "gloo"):
            continue  # on one CPU the scheduler decides, not the link
        best = min(measured[rank].link for rank in ranks)
        rank = max(ranks, key=lambda r: measured[r].link)
        if measured[rank].link > 3 * best:
            before = (rank - 1) % len(measured)
            rates = [measured[rank].nbytes / s / 1e9 for s in (measured[rank].link, best)]
            yield warn(
                f"the slowest link is from rank {before} ({ctx.hosts[before]}) to rank {rank} "
                f"({ctx.hosts[rank]}): {rates[0]:.3g} GB/s, the best has {rates[1]:.3g}",
                f"look at the network of {ctx.hosts[rank]}, or leave it out (sbatch --exclude)",
            )


def read_clocks(ctx: Context, before: list[Any]) -> list[float]:
    """The host's clock at five moments that are the same on all processes."""
    moments = []
    for _ in range(5):
        ctx.world.barrier()
        moments.append(time.time())
    return moments


def file_clock(ctx: Context, before: list[Any]) -> tuple[float, float | None]:
    """Seconds that this host's clock is ahead of rank 0's, and its file system's of its own."""
    rank = ctx.world.rank
    # All leave a barrier within about a millisecond; the median drops an exception.
    ahead = statistics.median(a - b for a, b in zip(before[rank], before[0], strict=True))
    if rank not in ctx.one_per_host:
        return ahead, None
    with scratch(ctx.home) as path:
        start = time.time()
        path.write_bytes(b"x")
        written, end = modified(path), time.time()
    # Within [start, end] is right; the kernel's coarse clock may lag by some milliseconds.
    return ahead, max(written - end, 0.0) + min(written - start, 0.0)


def modified(path: Any) -> float:
    """A file's modification time, in seconds since 1970."""
    return float(os.stat(path).st_mtime)


def judge_clocks(ctx: Context, facts: list[tuple[float, float | None]]) -> Findings:
    remedy = "time synchronisation (chrony) there; log lines and timeouts go by these clocks"
    apart = [rank for rank in ctx.one_per_host if abs(facts[rank][0]) > APART_S]
    for rank in apart:
        text = f"the clock of {ctx.hosts[rank]} is {facts[rank][0]:+.1f} s from rank 0's"
        yield warn(text, remedy)
    skews = {rank: skew for rank, (_, skew) in enumerate(facts) if skew is not None}
    odd = [rank for rank, skew in skews.items() if abs(skew) > APART_S]
    for rank in odd:
        yield warn(
            f"the file system of {ctx.home} is {skews[rank]:+.1f} s from the clock of "
            f"{ctx.hosts[rank]}",
            "time synchronisation (chrony) on the file server",
        )
    if not apart and not odd:
        hosts = max(abs(facts[rank][0]) for rank in ctx.one_per_host)
        files = max(map(abs, skews.values()))
        between = f"hosts within {hosts:.3f} s, " if len(set(ctx.hosts)) > 1 else ""
        yield ok(f"{between}file system within {files:.3f} s of the host")


def write_token(ctx: Context, before: list[Any]) -> str | None:
    """Rank 0 writes a file; returns its path."""
    if not ctx.world.is_main:
        return None
    path = ctx.cleanup.enter_context(scratch(ctx.home_above))
    with open(path, "w") as file:
        file.write(path.name)
        file.flush()
        os.fsync(file.fileno())
    return str(path)


def see_token(ctx: Context, before: list[Any]) -> str:
    """`seen`, or what this process finds in place of the file."""
    path = before[0]
    for pause in (*PAUSES, None):
        try:
            with open(path) as file:
                return "seen" if file.read() == os.path.basename(path) else "other contents"
        except OSError as error:
            if pause is None:
                return error.strerror or "unreadable"
            time.sleep(pause)
    return ""


def judge_token(ctx: Context, facts: list[str]) -> Findings:
    if ctx.world.size == 1:
        yield ok(f"{ctx.home_above}: one process")
        return
    for answer, ranks in by_value(facts).items():
        if answer != "seen":
            yield fail(
                f"{ctx.who(ranks)} do not see what rank 0 wrote in {ctx.home_above}: {answer}",
                "run.dir on a file system that all hosts mount",
            )
    if set(facts) == {"seen"}:
        yield ok(f"{ctx.who(range(len(facts)))} see what rank 0 writes in {ctx.home_above}")


CHECKS = (
    Check("all-reduce", (ready, exchange), judge_exchange),
    Check("clocks", (read_clocks, file_clock), judge_clocks),
    Check("shared folder", (write_token, see_token), judge_token),
)
