"""`status.json`: whether the run goes on, was stopped, is done or failed, and why."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

from ddp_ssl.run.claims import Claim
from ddp_ssl.run.witness import DIED, Witness
from ddp_ssl.utils.files import json_file, replace_text

logger = logging.getLogger("ddp_ssl")

State = Literal["running", "preempted", "done", "failed"]


def write_status(folder: Path, state: State, **fields: Any) -> None:
    """Replace `status.json` atomically; batch scripts decide from it whether to requeue."""
    status = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **fields}
    replace_text(folder / "status.json", json.dumps(status, indent=1) + "\n")


class RunStatus:
    """The `status.json` of this run. Nothing is written before the run has its `folder`."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.verdict: str | None = None
        """Whether the run has collapsed, as far as is known: in each status from then on."""
        self.claim: Claim | None = None
        """On rank 0, from before the folder is this run's until its end."""
        self._witness: Witness | None = None

    def begin(self, folder: Path) -> None:
        """The folder is this run's from now on."""
        self.folder = folder
        if self.claim is not None:
            try:
                self._witness = Witness(folder, self.claim.path)
            except OSError as error:
                logger.warning("status.json will not tell of a sudden death: %s", error)

    def record(self, state: State, **fields: Any) -> None:
        """Replace the status; one that cannot be written is a warning."""
        if self.folder is None:
            return
        if self.verdict is not None:
            fields["verdict"] = self.verdict
        try:
            write_status(self.folder, state, **fields)
        except OSError as error:
            logger.warning("status.json cannot be written: %s", error)

    def record_failure(self, reason: str) -> None:
        """Record `failed`, unless the process that failed did so itself."""
        if self.folder is None:
            return
        status = json_file(self.folder / "status.json")
        if status.get("state", "running") != "running" and status.get("error") != DIED:
            return
        self.record("failed", error=reason, retry=True)

    def release(self) -> None:
        """Give the folder up: the last thing that a run does to it."""
        if self._witness is not None:
            self._witness.dismiss()
            self._witness = None
        if self.claim is not None:
            self.claim.release()
            self.claim = None
