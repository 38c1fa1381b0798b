"""`log.to=[wandb]`: Weights & Biases, online or offline. Its own variables (WANDB_*) apply."""

from __future__ import annotations

import os
import re
import sys

import numpy as np
import numpy.typing as npt
import wandb

from ddp_ssl.logs.loggers import Logger, RunInfo

FINISH_S = 60  # seconds that the end of a run waits for the upload; `wandb sync` sends the rest


class WandB(Logger):
    """One W&B run for a run folder, whatever the number of restarts. Its files are in `wandb/`."""

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        online = wandb.setup().settings.mode == "online"
        if online and not wandb.login(prompt=False, verify=False):  # it would ask, and wait
            raise ValueError(
                "no API key: wandb login, WANDB_API_KEY or WANDB_MODE=offline is accepted"
            )
        folders = " ".join(path.name for path in run.folder.glob("wandb/*run-*"))
        starts = re.findall(r"run-(\d{8}_\d{6})-(\S+)", folders) if run.step is not None else []
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ddp_ssl"),
            name=os.environ.get("WANDB_NAME", run.folder.resolve().name),
            dir=str(run.folder),
            config=dict(run.config),
            id=max(starts)[1] if starts else None,
            resume="allow" if starts else None,
            settings=wandb.Settings(console="off", finish_timeout=FINISH_S),
        )

    def row(self, row: dict[str, float | int]) -> None:
        self._run.log({n: v for n, v in row.items() if n != "step"}, step=int(row["step"]))

    def image(self, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
        self._run.log({tag: wandb.Image(image)}, step=step)

    def histogram(self, tag: str, values: npt.NDArray[np.float64], step: int) -> None:
        self._run.log({tag: wandb.Histogram(values)}, step=step)

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # the run is closed while its error is handled
        self._run.finish(exit_code=int(failed))
