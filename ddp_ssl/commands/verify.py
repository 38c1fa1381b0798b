"""Is a loss on W processes the loss of one process with the whole batch?

Runs it on 1 to 4 processes of this machine, which hold different parts of one
batch, and compares value and gradient, both the mean over processes as DDP
takes it. docs/verify.md explains.
"""

from __future__ import annotations

import argparse
import functools
import os
import queue
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ddp_ssl.commands import common
from ddp_ssl.config import ConfigError
from ddp_ssl.methods._registry import builtin_methods
from ddp_ssl.utils.text import one_line, suggest

if TYPE_CHECKING:
    from ddp_ssl.checks.oracle import Failed, Measured, Shape

    Found = dict[int, list[Measured | Failed]]
    Key = tuple[int, int, int]  # target, world size, rank

SIZES = (1, 2, 3, 4)  # as the oracle's, which would bring torch
MEETING_S = 24 * 3600.0  # a loss may be slow; processes that die are noticed at once
PARTS = 12  # a batch of a multiple of 12 images can be split over 1 to 4 processes


def main(arguments: Sequence[str] | None = None) -> int:
    return common.exit_code(lambda: run(parser().parse_intermixed_args(arguments)))


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = common.Parser(
        "ddp-ssl verify",
        __doc__,
        "The last line is `verdict: WORD`. The exit code is 0 if all are exact, else 1.",
    )
    made.add_argument(
        "words", nargs="+", metavar="TARGET",
        help="module:callable, of [K, N, d] or of two views [N, d]; or a method, key=value for it",
    )  # fmt: skip
    made.add_argument("--shape", type=_shape, default=(2, 24, 16), metavar="K,N,d",
                      help="views, images and width of the embeddings (2,24,16)")  # fmt: skip
    return made


def _shape(text: str) -> Shape:
    numbers = text.split(",")
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not K,N,d, such as 2,24,16")
    views, images, width = map(int, numbers)
    if images % PARTS:
        raise argparse.ArgumentTypeError(
            f"{images} images cannot be split over 1 to 4 processes; a multiple of {PARTS} can"
        )
    return views, images, width


def run(options: argparse.Namespace) -> int:
    """Verify every target and print what is found; returns the exit code."""
    targets = [word for word in options.words if "=" not in word]
    settings = [word for word in options.words if "=" in word]
    methods = builtin_methods()
    for target in targets:
        if ":" not in target and target not in methods:
            raise ConfigError(
                f"{target}: neither module:callable nor a method{suggest(target, methods)}; "
                f"accepted methods: {', '.join(methods)}"
            )
    if not targets:
        raise ConfigError("nothing to verify; module:callable or a method is accepted")
    from ddp_ssl.checks.oracle import EXACT, judge

    views, images, width = options.shape
    code = 0
    for target, found in _measured(targets, options.shape, settings):
        try:
            lines, word = judge(found)
        except ConfigError as error:
            code = common.refuse(f"{target}: {error}")
            continue
        print(f"{target}: {views} views of {images} images, width {width}, float64")
        print("\n".join(f"  {line}" for line in lines))
        print(f"verdict: {word}", flush=True)
        code = max(code, int(word != EXACT))
    return code


# --- processes -----------------------------------------------------------------------------------


def _measured(
    targets: Sequence[str], shape: Shape, settings: Sequence[str]
) -> Iterator[tuple[str, Found]]:
    """Each target with what the processes of each world size measured, in four processes."""
    from torch import multiprocessing as mp
    from torch.multiprocessing.spawn import spawn

    from ddp_ssl.distributed import open_store

    store, port = open_store()
    results = mp.get_context("spawn").Queue()
    work = (port, targets, shape, settings, results)
    processes = spawn(_work, work, SIZES[-1], join=False)  # type: ignore[no-untyped-call]
    waiting: dict[Key, Measured | Failed] = {}
    last = len(targets) - 1, SIZES[-1]
    for number, target in enumerate(targets):
        found: Found = {}
        for size in SIZES:
            for rank in range(size):
                while (number, size, rank) not in waiting:
                    _receive(target, processes, results, waiting, last)
            found[size] = [waiting.pop((number, size, rank)) for rank in range(size)]
        yield target, found
    while not processes.join():
        pass
    del store  # it lives as long as the processes


def _receive(
    target: str,
    processes: Any,
    results: Any,
    waiting: dict[Key, Measured | Failed],
    last: tuple[int, int],
) -> None:
    """One more result; raises `ConfigError` if a process has died.

    `last` are the target and the world size of every process's last result.
    """
    from torch.multiprocessing.spawn import ProcessException

    ended = [rank for rank, p in enumerate(processes.processes) if p.exitcode is not None]
    try:
        key, result = results.get(timeout=0.2)
        waiting[key] = result
    except queue.Empty:
        try:
            processes.join(0)
        except ProcessException as error:
            why = one_line(str(error).strip().rpartition("\n")[2])
            raise ConfigError(f"a process died while it ran {target}: {why}") from None
        # A process that has ended sent all its results before.
        early = [rank for rank in ended if (*last, rank) not in waiting]
        if early:
            for process in processes.processes:
                process.terminate()
            raise ConfigError(
                f"a process died while it ran {target}: process {early[0]} ended without a result"
            ) from None


def _work(
    rank: int,
    port: int,
    targets: Sequence[str],
    shape: Shape,
    settings: Sequence[str],
    results: Any,
) -> None:
    import torch

    from ddp_ssl.checks.oracle import measure
    from ddp_ssl.distributed import meet

    torch.set_num_threads(1)
    for number, target in enumerate(targets):
        for size in SIZES:
            name = f"target {number}, {size} processes"
            # All four meet, so that none waits in a group for one that is at work on another size.
            meeting = functools.partial(meet, port, name, SIZES[-1], timeout_s=MEETING_S)
            if rank >= size:
                meeting(True)
                continue
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(size),
                LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), GROUP_WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RESTART_COUNT=str(SIZES[-1] * number + size),
            )  # fmt: skip
            results.put(((number, size, rank), measure(target, shape, settings, meeting)))
