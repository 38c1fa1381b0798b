"""The first step of a process takes longer than all others; a line says why."""

from __future__ import annotations

import logging
import time

from ddp_ssl.training.job import Job

logger = logging.getLogger("ddp_ssl")


class FirstStep:
    """Measures the first step on the host, and tells what it took the time for."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.perf_counter()
        self._reading: float | None = None
        self._over = False

    def has_images(self) -> None:
        """The images of a step are there."""
        if self._reading is None:
            self._reading = time.perf_counter() - self._began

    def is_done(self) -> None:
        """A step is done."""
        if self._over or self._reading is None:
            return
        self._over = True
        rest = time.perf_counter() - self._began - self._reading
        extra = ["torch.compile"] if self._job.config.model.compile else []
        extra += ["cuDNN's choice of kernels"] if self._job.world.device.type == "cuda" else []
        logger.info(
            f"first step: {self._reading:.1f} s until the first images were read and decoded, "
            f"{rest:.1f} s for the step" + (f", with {' and '.join(extra)}" if extra else "")
        )
