"""Saving on all processes together, while training goes on."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddp_ssl.checkpoint import store
from ddp_ssl.checkpoint.saver import Saver
from ddp_ssl.config import Checkpoint
from ddp_ssl.distributed import World
from ddp_ssl.errors import SaveError
from ddp_ssl.run.status import RunStatus
from ddp_ssl.run.watchdog import Watchdog

logger = logging.getLogger("ddp_ssl")

SAVE_AGAIN_S = 5.0  # between attempts of a save that must succeed


@dataclass
class Save:
    """A save in flight. After a failure it stays in flight until a later attempt succeeds."""

    step: int
    epoch: int
    permanent: bool
    best: bool
    failures: int = 0
    writing: bool = True


class Checkpointer:
    """Writes checkpoints in a thread of rank 0; all ranks learn the outcome together.

    A failed save warns and keeps the older checkpoints. It is written again at logging steps,
    unless a newer save replaces it.
    """

    def __init__(
        self,
        folder: Path,
        settings: Checkpoint,
        world: World,
        watch: Watchdog,
        status: RunStatus,
        sync_metrics: Callable[[], None],
        origin: dict[str, dict[str, str]],
    ) -> None:
        """`origin` is a part of every checkpoint: the run's `identity` and its `code`.

        `sync_metrics` waits until the rows so far are on disk.
        """
        self.origin = origin
        self._folder, self._settings, self._status = folder, settings, status
        self._world, self._watch, self._sync_metrics = world, watch, sync_metrics
        self._saver = Saver()
        self._save: Save | None = None

    def save(
        self,
        state: dict[str, Any],
        rank_state: dict[str, Any],
        *,
        permanent: bool = False,
        best: bool = False,
        must_succeed: bool = False,
    ) -> None:
        """Save `state` (of which rank 0's counts) with every rank's own `rank_state`.

        The result is the newest checkpoint, is kept for good if `permanent`, and is the best one
        if `best`. With `must_succeed` the run waits, and tries again at once after a failure.
        Raises `SaveError` on all ranks after `checkpoint.max_failures` failures in a row.
        """
        self._poll(block=True)
        failed, self._save = self._save, Save(state["step"], state["epoch"], permanent, best)
        if failed is not None:  # this save takes its place
            self._save.permanent |= failed.permanent
            self._save.best |= failed.best
            self._save.failures = failed.failures
        ranks = self._world.gather_objects(store.to_bytes(rank_state))
        if ranks is not None:
            packed = [torch.frombuffer(bytearray(own), dtype=torch.uint8) for own in ranks]
            write = functools.partial(self._write, self._save.permanent, self._save.best)
            self._saver.start({**state, **self.origin, "ranks": packed}, write)
        if must_succeed:
            self._poll(block=True)
            while self._save is not None:
                time.sleep(SAVE_AGAIN_S)
                self._write_again()
                self._poll(block=True)

    def poll(self) -> None:
        """Learn the outcome of the save in flight, if there is one; write a failed save again.

        Never waits for the disk. Raises `SaveError` like `save`.
        """
        self._poll(block=False)
        if self._save is not None and not self._save.writing:
            self._write_again()

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        with self._watch.during("saving a checkpoint"):
            self._saver.close()

    def _write_again(self) -> None:
        assert self._save is not None
        self._save.writing = True
        if self._world.is_main:
            self._saver.again()

    def _poll(self, block: bool) -> None:
        save = self._save
        if save is None or not save.writing:
            return
        with self._watch.during("saving a checkpoint"):
            outcome = self._saver.outcome(block) if self._world.is_main else None
            outcome = self._world.broadcast_object(outcome)
        if outcome is None:
            return
        save.writing = False
        if outcome.fatal:
            raise SaveError(
                f"the checkpoint of step {save.step} cannot be saved: {outcome.problem}"
            )
        if not outcome.problem:
            self._save = None
            if self._world.is_main:
                self._status.record("running", step=save.step, epoch=save.epoch)
            return
        save.failures += 1
        bound = self._settings.max_failures
        if save.failures >= bound:
            raise SaveError(
                f"checkpoint.max_failures: {bound} saves in a row failed, the last at step "
                f"{save.step}: {outcome.problem}; the checkpoints there are can be continued with "
                "run.resume=auto"
            )
        logger.warning(
            "checkpoint at step %d not saved (%d of %d failures that end the run), going on: %s",
            save.step, save.failures, bound, outcome.problem,
        )  # fmt: skip

    def _write(self, permanent: bool, best: bool, state: dict[str, Any]) -> None:
        """Write the files of a checkpoint, in the saver's thread."""
        self._sync_metrics()  # the rows up to the checkpoint's step
        path = store.save(
            self._folder,
            state,
            step=state["step"],
            epoch=state["epoch"],
            identity=state["identity"],
            world_size=self._world.size,
            keep=self._settings.keep,
            permanent=permanent,
        )
        if best:
            store.save_best(self._folder, path)
