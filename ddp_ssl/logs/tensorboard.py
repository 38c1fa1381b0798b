"""`log.to=[tensorboard]`: events beside `metrics.jsonl`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from ddp_ssl.logs.loggers import Logger, RunInfo

# Figures that TensorBoard does not get: its own axes, and what is one number for a whole run.
UNSHOWN = ("step", "epoch", "eval/knn_bank", "eval/knn_raw_pixels")

# TensorBoard's tab "Custom Scalars", in this order: groups, and the figure of each chart.
LAYOUT = {
    "1. Does it learn? The loss falls, both accuracies rise": {
        "loss": "train/loss",
        "k-NN top-1": "eval/knn_top1",
        "online probe top-1": "eval/probe_top1",
    },
    "2. Does it collapse? Then ranks fall below their first value, and uniformity rises to 0": {
        "effective rank of R": "rep/effective_rank_r",
        "effective rank of Z": "rep/effective_rank_z",
        "uniformity of R": "rep/uniformity_r",
        "uniformity of Z": "rep/uniformity_z",
    },
    "3. Optimiser and speed": {
        "learning rate": "optim/lr",
        "norm of the gradient": "optim/grad_norm",
        "images/s": "perf/images_per_s",
        "share of the time that waits for data": "perf/data_wait",
    },
    "4. AdaDim: the balance of VICReg (alpha 0) and InfoNCE (1), and what it moves": {
        "alpha": "rep/alpha",
        "I(R;Z) in nats": "rep/mutual_information",
    },
}
FLUSH_S = 5  # seconds after which TensorBoard's readers see new events, at the latest


class TensorBoard(Logger):
    """Each row is one event. Figures that are one number for a whole run are left out."""

    rewinds = True

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        # Hides the rows that an interrupted run wrote after the checkpoint.
        purge = 0 if run.step is None else run.step + 1
        self._events: Any = SummaryWriter(str(run.folder), purge_step=purge, flush_secs=FLUSH_S)
        charts = {
            group: {title: ["Multiline", [f"^{tag}$"]] for title, tag in parts.items()}
            for group, parts in LAYOUT.items()
        }
        self._events.add_custom_scalars(charts)

    def row(self, row: dict[str, float | int]) -> None:
        shown = {name: value for name, value in row.items() if name not in UNSHOWN}
        if not shown.get("run/bad_images", 1):
            del shown["run/bad_images"]
        if shown:
            # One event for the row: `add_scalar` for each figure costs ten times as much.
            points = [Summary.Value(tag=name, simple_value=v) for name, v in shown.items()]
            self._events.file_writer.add_summary(Summary(value=points), int(row["step"]))

    def image(self, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
        self._events.add_image(tag, image, step, dataformats="HWC")

    def histogram(self, tag: str, values: npt.NDArray[np.float64], step: int) -> None:
        self._events.add_histogram(tag, values, step)

    def text(self, tag: str, text: str, step: int) -> None:
        self._events.add_text(tag, text, step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()
