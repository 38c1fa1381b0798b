"""Writing a checkpoint while training goes on.

What takes time in a save is pickling, hashing and waiting for the disk: 1.2 s for a ResNet-50 with
its momentum on a local disk, longer on a shared one. A thread of rank 0 does that from a copy in
host memory, so that training waits for the copy only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch import Tensor

from ddp_ssl.checkpoint import CheckpointError
from ddp_ssl.threads import beside


class HostCopy:
    """Copies of nested state in host memory that is kept from one copy to the next.

    Kept memory is a fifth of the time: its pages exist, and for a GPU they are pinned.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._from_gpu = False

    def of(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with tensors copied, and dicts, lists and tuples made anew.

        Strides stay as they are. The result holds until the next call.
        """
        used: dict[tuple[Any, ...], Tensor] = {}
        self._from_gpu = False
        copied: dict[str, Any] = self._copy(state, (), used)
        self._kept = used
        if self._from_gpu:
            torch.cuda.synchronize()  # these copies run behind
        return copied

    def _copy(self, value: Any, place: tuple[Any, ...], used: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            mine = self._kept.get(place)
            if mine is None or (mine.shape, mine.stride(), mine.dtype) != (
                value.shape, value.stride(), value.dtype,
            ):  # fmt: skip
                mine = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._from_gpu |= value.is_cuda
            used[place] = mine.copy_(value.detach(), non_blocking=True)
            return used[place]
        if isinstance(value, dict):
            return {name: self._copy(v, (*place, name), used) for name, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(v, (*place, i), used) for i, v in enumerate(value))
        return value


def settled(value: Any) -> Any:
    """Nested state with the results of its futures."""
    if isinstance(value, Future):
        return value.result()
    if isinstance(value, dict):
        return {name: settled(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(settled(v) for v in value)
    return value


class Saver:
    """One checkpoint at a time, written in a thread of rank 0."""

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._writing: Future[None] | None = None

    def start(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Copy `state`, and `write` the copy in the background.

        What is still being computed may be there as a `Future`: it is waited for there. `write` may
        raise `CheckpointError`. The one before must have been waited for.
        """
        if self._writing is not None:
            raise RuntimeError("a checkpoint is still being written: ask for its outcome first")
        copied = self._copy.of(state)
        self._writing = beside(lambda: write(settled(copied)))

    def outcome(self, block: bool) -> str | None:
        """Why the checkpoint under way could not be written, "" if it was; None: not yet done.

        With `block` never None. Raises what `write` raised, if it is no `CheckpointError`.
        """
        if self._writing is None or not (block or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            wait([self._writing])
