"""Bytes and times of tools/scaling_model.py beside those of real gloo processes on CPUs.

    python tools/bench/scaling.py [--ranks 1,2,4,8] [--only adadim]
    python tools/bench/scaling.py --link 200 [key=value ...]      (as root)

The first prints calls and bytes of one training step of the embedded default by kind of collective,
predicted and counted (`ddp_ssl.distributed.comm_stats`; DDP's gradients in its own
communication hook). Exit code 1 if any differ.

The second joins two network namespaces by a cable of so many megabits a second (tc tbf), takes
steps of two processes across it and prints the time of their communication, predicted from the
latency + bytes / rate of each call and measured, and the bytes that left the interface. It
needs root, `ip` and `tc`, and says so where they are missing; it removes the namespaces at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ddp_ssl import distributed
from ddp_ssl.distributed import StopFlag, World, comm_stats
from ddp_ssl.methods.base import Progress
from ddp_ssl.run.configure import load
from ddp_ssl.training.build import on_device
from tools.bench.compare import free_port, parser_of
from tools.bench.shared import ALPHA, CLASSES, join, learner_of, random_batch
from tools.scaling_model import SUMS, Cluster, elapsed, record


def _count(buckets, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations: types only
    """DDP's own all-reduce; its size is noted."""
    buckets.append(bucket.buffer().nbytes)
    return allreduce_hook(None, bucket)


Counts = dict[str, tuple[int, int]]
CASES: dict[str, list[str]] = {
    "adadim, gather": ["method.name=adadim", "method.route=gather"],
    "adadim, moments": ["method.name=adadim", "method.route=moments"],
    "adadim, beta: off": ["method.name=adadim", "method.beta=off"],
    "adadim, mi_form: cov": [
        "method.name=adadim",
        "method.mi_form=cov",
        "model.projector=[512, 512, 128]",
    ],
    "lejepa": ["method.name=lejepa"],
    "vicreg": ["method.name=vicreg"],
    "simclr": ["method.name=simclr"],
    "barlow_twins": ["method.name=barlow_twins"],
    "adadim, bf16": ["method.name=adadim", "optim.precision=bf16"],
    "vicreg, bf16 gradients": ["method.name=vicreg", "optim.gradient_compression=bf16"],
}


class Steps:
    """Training steps of this process among others, on random images."""

    def __init__(self, world: World, arguments: Sequence[str]) -> None:
        config = load([*arguments, "run.device=cpu"]).config
        comm = distributed.comm_of(world, config.data.view_shards)
        self.learner = learner_of(config, comm)
        self.module: nn.Module = on_device(self.learner, config, world)
        self.buckets: list[int] = []
        self.compressed = config.optim.gradient_compression is not None
        if isinstance(self.module, DistributedDataParallel) and not self.compressed:
            self.module.register_comm_hook(self.buckets, _count)
        self.flag = StopFlag(world)
        self.batch = random_batch(config, comm)
        self.step()  # DDP fixes its buckets here

    def step(self) -> None:
        """Forward, backward and the stop flag; no optimiser."""
        total, _ = self.module(self.batch)
        total.backward()
        comm_stats.gradients_reduced()
        self.learner.method.after_step(Progress(0, 100, 0, 10))
        self.flag.exchange(False)
        self.module.zero_grad(set_to_none=True)

    def counted(self) -> Counts:
        """Calls and bytes of one step, by kind."""
        self.flag.wait()
        comm_stats.counts.clear()
        self.buckets.clear()
        with self._counting_compressed() if self.compressed else nullcontext():
            self.step()
        self.flag.wait()
        counts = dict(comm_stats.counts)
        if "gradients" in counts:
            assert counts["gradients"] == (0, sum(self.buckets)), "not what DDP reduced"
            counts["gradients"] = len(self.buckets), sum(self.buckets)
        return counts

    @contextmanager
    def _counting_compressed(self) -> Iterator[None]:
        """DDP takes one hook, and that is the compressing one: its buckets alone are bfloat16."""
        reduce = torch.distributed.all_reduce

        def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            if tensor.dtype == torch.bfloat16:
                self.buckets.append(tensor.nbytes)
            return reduce(tensor, *args, **options)

        with patch.object(torch.distributed, "all_reduce", counting):
            yield


def counted(world: World, arguments: Sequence[str]) -> Counts:
    """Calls and bytes of one step of this process, counted at the collectives."""
    return Steps(world, arguments).counted()


def modelled(ranks: int, arguments: Sequence[str]) -> Counts:
    """The same as the model predicts it."""
    config = load(list(arguments)).config
    return record(config, ranks, Cluster(), classes=CLASSES, alpha=ALPHA, gpu=False).counts()


def _rank_main(rank: int, size: int, port: int, cases: dict[str, list[str]], out: Any) -> None:
    world = join(rank, size, port, "cpu", 60)
    found = {name: counted(world, arguments) for name, arguments in cases.items()}
    if rank == 0:
        out.put(found)
    world.barrier()
    distributed.stop()


def count_all(size: int, cases: dict[str, list[str]]) -> dict[str, Counts]:
    """The counts of rank 0 among `size` processes."""
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    port = free_port()
    workers = [
        context.Process(target=_rank_main, args=(rank, size, port, cases, out), daemon=True)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()  # gloo ends the others where one fails
        if worker.exitcode:
            raise SystemExit(f"scaling: a process of {size} failed, its error is above")
    found: dict[str, Counts] = out.get()
    return found


def compare_bytes(sizes: Sequence[int], cases: dict[str, list[str]]) -> bool:
    """Print model and count for all sizes and cases; returns whether all are equal."""
    print("| method | processes | collective | model: calls, bytes | counted | |")
    print("| --- | ---: | --- | ---: | ---: | --- |")
    same = True
    for size in sizes:
        real = count_all(size, cases)
        for name, arguments in cases.items():
            model = modelled(size, arguments)
            if not model and not real[name]:
                print(f"| {name} | {size} | none | 0 | 0 | equal |", flush=True)
            for kind in {**model, **real[name]}:
                one, other = model.get(kind, (0, 0)), real[name].get(kind, (0, 0))
                same = same and one == other
                left, right = (f"{calls}, {nbytes:,}" for calls, nbytes in (one, other))
                mark = "equal" if one == other else "**differs**"
                print(f"| {name} | {size} | {kind} | {left} | {right} | {mark} |", flush=True)
    return same


ENDS = ("sclA", "sclB")
BURST = 16_000  # bytes that tbf lets pass at once; larger segments are cut to packets
PAYLOAD = 1448 / 1514  # of an Ethernet frame of TCP


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--link: {' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable; their names."""
    names = [f"scale{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        cable = ["type", "veth", "peer", "name", ENDS[1], "netns", names[1]]
        _run("ip", "link", "add", ENDS[0], "netns", names[0], *cable)
        for number, (name, end) in enumerate(zip(names, ENDS, strict=True), 1):
            _run("ip", "-n", name, "addr", "add", f"10.78.0.{number}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", end, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def one_end(arguments: Sequence[str], mbit: float, repeats: int) -> None:
    """One of two processes: steps over the free cable and over the slow one; prints JSON."""
    torch.set_num_threads(1)
    world = distributed.start("cpu", 120)
    steps, end = Steps(world, arguments), ENDS[world.rank]
    sent = Path(f"/sys/class/net/{end}/statistics/tx_bytes")

    def measure() -> tuple[list[float], float]:
        seconds = []
        before = int(sent.read_text())
        for _ in range(repeats):
            begin = time.perf_counter()
            steps.step()
            seconds.append(time.perf_counter() - begin)
        steps.flag.wait()
        return seconds, (int(sent.read_text()) - before) / repeats

    measure()
    latency = distributed.measure_bandwidth(world, world.device, 1 << 12, 60).latency
    free, _ = measure()
    world.barrier()
    _run("tc", "qdisc", "add", "dev", end, "root", "tbf",
         "rate", f"{mbit}mbit", "burst", str(BURST), "latency", "1s")  # fmt: skip
    world.barrier()
    steps.step()
    slow, nbytes = measure()
    world.barrier()
    print(json.dumps({"latency": latency, "free": free, "slow": slow, "sent": nbytes}), flush=True)
    distributed.stop()


def over_link(arguments: list[str], mbit: float, repeats: int) -> None:
    """Print predicted and measured seconds of a step's communication across a link of that rate."""
    lacking = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if os.geteuid() or lacking:
        why = f"{' and '.join(lacking)} not found" if lacking else "not root"
        raise ValueError(f"--link: {why}; it needs root, ip and tc, to make network namespaces")
    with two_machines() as names:
        ranks = []
        for rank, (name, end) in enumerate(zip(names, ENDS, strict=True)):
            environment = {
                "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
                "MASTER_ADDR": "10.78.0.1", "MASTER_PORT": 29778, "GLOO_SOCKET_IFNAME": end,
            }  # fmt: skip
            command = [
                "ip", "netns", "exec", name, "env", *(f"{k}={v}" for k, v in environment.items()),
                sys.executable, "-W", "ignore", __file__, *arguments, "--one-end",
                "--link", str(mbit), "--repeats", str(repeats),
            ]  # fmt: skip
            ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise ValueError("--link: a process failed, its error is above")
    ends = [json.loads(text.splitlines()[-1]) for text in outputs]

    config = load(arguments).config
    step = record(config, 2, Cluster(), classes=CLASSES, alpha=ALPHA)
    compute = min(ends[0]["free"])  # other work on the machine only adds
    bytes_per_s = mbit * 1e6 / 8 * PAYLOAD
    link = Cluster(
        node_size=1, inter=bytes_per_s, latency=ends[0]["latency"], latency_per_doubling=0
    )
    # The losses' operations are in the measured time, too: all of it is spread like the network's.
    bare = [replace(event, seconds=0.0) for event in step.events]
    predicted = elapsed(replace(step, events=bare), link, step.flops / compute) - compute
    measured = [seconds - compute for seconds in ends[0]["slow"]]
    wire = sum(
        (1.0 if kind in SUMS else 0.5) * nbytes for kind, (_, nbytes) in step.counts().items()
    )
    print(f"{' '.join(arguments)}: two processes, {mbit:g} Mbit/s, {repeats} steps\n")
    print("| | predicted | measured |\n| --- | ---: | ---: |")
    print(f"| bytes sent by rank 0 a step | {wire / PAYLOAD:,.0f} | {ends[0]['sent']:,.0f} |")
    print(
        f"| communication, ms a step | {1e3 * predicted:.0f} | "
        f"{1e3 * min(measured):.0f} (median {1e3 * statistics.median(measured):.0f}, "
        f"largest {1e3 * max(measured):.0f}) |"
    )
    print(
        f"\nA step over the free cable: {1e3 * compute:.0f} ms at best (largest "
        f"{1e3 * max(ends[0]['free']):.0f}); latency of a 4-byte all-reduce "
        f"{1e3 * link.latency:.2f} ms. Predicted: latency + bytes / rate of each call, the "
        "gradients behind backward; a frame of 1514 bytes carries 1448. Measured: the wall time of "
        "a step, the best of all, less that over the free cable."
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="with --link")
    parser.add_argument("--ranks", default="1,2,4,8", help="default: %(default)s")
    parser.add_argument("--only", choices=sorted(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--link", type=float, metavar="MBIT", help="rate of the cable, Mbit/s")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each part of --link")
    parser.add_argument("--one-end", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    try:
        if options.one_end:
            one_end(options.arguments, options.link, options.repeats)
            return 0
        if options.link is not None:
            if options.link <= 0 or options.repeats < 1:
                raise ValueError("--link and --repeats: positive numbers are accepted")
            over_link(options.arguments, options.link, options.repeats)
            return 0
        cases = {k: v for k, v in CASES.items() if options.only in (None, k)}
        return 0 if compare_bytes([int(part) for part in options.ranks.split(",")], cases) else 1
    except ValueError as error:
        print(f"scaling: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Accessing the data pointer")
    sys.exit(main())
