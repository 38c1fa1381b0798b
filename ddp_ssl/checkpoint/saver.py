"""Writing a checkpoint while training goes on.

Pickling, hashing and waiting for the disk take 1.2 s for a ResNet-50 with its momentum on a local
disk, longer on a shared one. A thread of rank 0 does that from a copy in host memory, so that
training waits for the copy only.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddp_ssl.errors import CheckpointError
from ddp_ssl.utils.background import in_background

logger = logging.getLogger("ddp_ssl")


class HostCopy:
    """Copies of nested state in host memory that is kept from one copy to the next.

    Kept memory takes a fifth of the time: its pages exist, and for a GPU they are pinned, where
    there is room for that.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[tuple[int, ...], Tensor]] = {}
        self._from_gpu = False

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with its tensors copied, and everything else made anew.

        Strides stay as they are where there are no gaps. The result holds until the next call.
        """
        used: dict[tuple[Any, ...], tuple[tuple[int, ...], Tensor]] = {}
        self._from_gpu = False
        copied: dict[str, Any] = self._copy(state, (), used)
        self._kept = used
        if self._from_gpu:
            torch.cuda.synchronize()  # these copies run behind
        return copied

    def _copy(self, value: Any, place: tuple[Any, ...], used: dict[tuple[Any, ...], Any]) -> Any:
        if isinstance(value, Tensor):
            strides, mine = self._kept.get(place, ((), None))
            if mine is None or (strides, mine.shape, mine.dtype) != (
                value.stride(), value.shape, value.dtype,
            ):  # fmt: skip
                mine = _memory_for(value)
            used[place] = value.stride(), mine
            self._from_gpu |= value.is_cuda
            return mine.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
            made.update((n, self._copy(v, (*place, n), used)) for n, v in value.items())
            if hasattr(value, "_metadata"):  # a module's state: versions of its layers
                made._metadata = value._metadata  # type: ignore[attr-defined]
            return made
        if type(value) in (list, tuple):
            return type(value)(self._copy(v, (*place, i), used) for i, v in enumerate(value))
        return copy.deepcopy(value)


def _memory_for(value: Tensor) -> Tensor:
    if value.is_cuda:
        try:
            return torch.empty_like(value, device="cpu", pin_memory=True)
        except RuntimeError:  # no more memory can be pinned
            pass
    return torch.empty_like(value, device="cpu")


class Outcome(NamedTuple):
    """The reason why a checkpoint could not be written ("" if it was), and if it never can be."""

    problem: str
    fatal: bool = False


class Saver:
    """One checkpoint at a time, written in a thread of rank 0."""

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._work: Callable[[], None] | None = None
        self._writing: Future[None] | None = None

    def start(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Copy `state`, and `write` the copy in the background.

        `write` may raise `CheckpointError`. Ask for the `outcome` of the one before first.
        """
        if self._writing is not None:
            raise RuntimeError("a checkpoint is still being written: ask for its outcome first")
        self._work = functools.partial(write, self._copy.copy(state))
        self._writing = in_background(self._work)

    def again(self) -> None:
        """Write the same copy once more."""
        assert self._work is not None
        assert self._writing is None
        self._writing = in_background(self._work)

    def outcome(self, block: bool) -> Outcome | None:
        """The outcome of the checkpoint in flight; None if there is none, or not yet.

        With `block` it is waited for.
        """
        if self._writing is None or not (block or self._writing.done()):
            return None
        error, self._writing = self._writing.exception(), None
        if error is None or isinstance(error, CheckpointError):
            return Outcome("" if error is None else str(error))
        return Outcome(f"{type(error).__name__}: {error}", fatal=True)

    def close(self) -> None:
        """Wait for the checkpoint in flight; a warning if it could not be written."""
        outcome = self.outcome(block=True)
        self._work = None  # it keeps the process group alive
        if outcome is not None and outcome.problem:
            logger.warning("the last checkpoint is not saved: %s", outcome.problem)
