"""A step's time with each option: forward, loss and backward of one network, in turn.

    python tools/bench/options.py [--processes 1] [--repeats 11] [CONFIG.yaml] [key=value ...]

One process compares `model.compile`, the memory format and the stacking of views; without batch
norms also the batch in four parts and blocks computed again; on a GPU also compilation with CUDA
graphs (torch's `reduce-overhead`). Several (gloo on a CPU, a GPU each with
NCCL) compare DDP's options: a static graph, buckets that gradients are copied into, gradients in
bf16. The config is the embedded default unless one is given. Compilation itself is not timed. The
time is the processor's with one process on a CPU, the wall clock's with several, and the device's
on a GPU.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from compare import device_line, free_port, in_turn, parser_of, spread, verdict
from shared import join, learner_of, random_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_ssl import distributed
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import World
from ddp_ssl.run.configure import load
from ddp_ssl.training.build import on_device

PLAIN = "as it is"
Step = Callable[[], object]


def step_of(world: World, arguments: Sequence[str], how: str = "", **ddp: bool) -> Step:
    """Forward, loss and backward on random images, on all processes; warmed up."""
    config = load([*arguments, f"run.device={world.device.type}"]).config
    comm = distributed.comm_of(world, config.data.view_shards)
    learner = learner_of(config, comm)
    if how:
        learner.method._apply_network = torch.compile(learner.method._apply_network, mode=how)

    @functools.wraps(DistributedDataParallel)
    def told(*given: Any, **options: Any) -> nn.Module:
        return DistributedDataParallel(*given, **{**options, **ddp})

    with patch.object(distributed.collectives, "DistributedDataParallel", told):
        module: nn.Module = on_device(learner, config, world)
    made = random_batch(config, comm)
    shape = torch.channels_last if config.model.channels_last else torch.contiguous_format
    views = [view.to(world.device, memory_format=shape) for view in made.views]
    batch = Batch(views, made.ids.to(world.device), made.labels.to(world.device))

    def step() -> None:
        total, _ = module(batch)
        total.backward()
        module.zero_grad(set_to_none=False)

    for _ in range(3):
        step()
    return step


def contestants(world: World, arguments: list[str]) -> dict[str, Step]:
    """The options for this number of processes."""
    some = functools.partial(step_of, world)
    if world.size == 1:
        found = {
            PLAIN: some(arguments),
            "model.channels_last=true": some([*arguments, "model.channels_last=true"]),
            "model.views_forward=stacked": some([*arguments, "model.views_forward=stacked"]),
        }
        for saving in ("optim.accumulate=4", "model.checkpointing=true"):
            with contextlib.suppress(ValueError):  # batch norms
                found[saving] = some([*arguments, saving])
        modes = {"model.compile=true": "default"}
        if world.device.type == "cuda":
            modes["compiled, CUDA graphs"] = "reduce-overhead"
        for name, mode in modes.items():
            try:
                found[name] = some(arguments, mode)
            except RuntimeError as error:  # on a CPU it needs a C++ compiler
                print(f"{name}: left out, {str(error).splitlines()[0]}", file=sys.stderr)
        return found
    return {
        PLAIN: some(arguments),
        "static graph": some(arguments, static_graph=True),
        "gradients copied": some(arguments, gradient_as_bucket_view=False),
        "bf16 gradients": some([*arguments, "optim.gradient_compression=bf16"]),
    }


def measure(world: World, arguments: list[str], repeats: int) -> None:
    """All in turn; the first process prints."""
    made = contestants(world, arguments)
    wall = world.size > 1 and world.device.type == "cpu"
    # All processes are in the same step at once, so that one clock tells what all wait for.
    with patch.object(time, "process_time", time.perf_counter if wall else time.process_time):
        times = in_turn(made, repeats, world.device)
    if not world.is_main:
        return
    unit = "ms" if wall or world.device.type == "cuda" else "CPU-ms"
    print(f"{device_line(world.device)}; {world.size} process(es)\n")
    print(f"| | {unit}, median (range) | times that of the first |\n| --- | --- | --- |")
    for name, values in times.items():
        ratio = "1" if name == PLAIN else verdict(times[PLAIN], values)
        print(f"| {name} | {spread(values)} | {ratio} |")


def one(rank: int, size: int, port: int, arguments: list[str], repeats: int) -> None:
    """A process of several."""
    world = join(rank, size, port, "cuda" if torch.cuda.is_available() else "cpu", 120)
    measure(world, arguments, repeats)
    world.barrier()
    distributed.stop()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    options, arguments = parser.parse_known_args()
    rest: tuple[Any, ...] = (options.processes, free_port(), arguments, options.repeats)
    if options.processes == 1:
        one(0, *rest)
    else:
        torch.multiprocessing.spawn(one, rest, options.processes)


if __name__ == "__main__":
    main()
