"""A pool of processes that form real gloo groups, started once per test session."""

from __future__ import annotations

import functools
import importlib
import io
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

MAX_RANKS = 4


class Ranks:
    """`run(function, world_size, ...)` calls a module-level function on every rank of a group.

    The function's first argument is the `World`; results come back in rank order. `launch` calls it
    with a launcher's environment only, for functions that start the group themselves.
    """

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(MAX_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        return self._call(function, world_size, True, args)

    def launch(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        return self._call(function, world_size, False, args)

    def _call(
        self, function: Callable[..., Any], world_size: int, start: bool, args: tuple[Any, ...]
    ) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        name = (function.__module__, function.__qualname__)
        for rank, pipe in enumerate(self.pipes[:world_size]):
            pipe.send_bytes(_dump((name, rank, world_size, port, start, args)))
        replies = [torch.load(io.BytesIO(p.recv_bytes()), weights_only=False)
                   for p in self.pipes[:world_size]]  # fmt: skip
        errors = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(replies) if not ok]
        if errors:
            raise AssertionError("\n".join(errors))
        return [value for _, value in replies]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + 5
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()  # a run that waits for another rank only notes SIGTERM
            process.join()


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@functools.cache
def _hasten() -> None:
    """Leave out work that every run repeats and no test looks at: a fifth of a tiny run."""
    from nvidia.dali._utils import dali_trace

    dali_trace.set_tracing(enabled=False)  # of each operator to its line of code


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    from ddp_ssl import distributed

    while True:
        try:
            message = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
        except (EOFError, OSError):
            return
        (module, function), rank, size, port, start, args = message
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        if not start:
            _hasten()
        try:
            first = (distributed.start("cpu", 60),) if start else ()
            reply = (True, getattr(importlib.import_module(module), function)(*first, *args))
        except BaseException:
            reply = (False, traceback.format_exc())
        finally:
            distributed.stop()
        pipe.send_bytes(_dump(reply))
