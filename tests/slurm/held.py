"""AdaDim that waits, or dies, at a step that the test chooses, by environment."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from ddp_ssl.methods.adadim import AdaDim
from ddp_ssl.methods.base import Progress


class Held(AdaDim):
    """HOLD_AT=STEP: waits there until the file HOLD_UNTIL is there. DIE_AT=STEP: rank 1 is killed.

    So that what interrupts a run does so in the middle of it, however fast the machine is.
    """

    def before_optimizer(self, progress: Progress) -> None:
        super().before_optimizer(progress)
        if str(progress.step) == os.environ.get("DIE_AT") and os.environ.get("SLURM_PROCID") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if str(progress.step) == os.environ.get("HOLD_AT"):
            until = Path(os.environ["HOLD_UNTIL"])
            deadline = time.monotonic() + 240
            while not until.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
