"""`metrics.jsonl` and TensorBoard: rows of metrics for programs.

Single-process: the recorder gives only rank 0 a writer. Metrics are named `group/name`
(`train/ optim/ rep/ eval/ perf/`) and are the same in `metrics.jsonl` and in TensorBoard.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger("ddp_ssl")

Row = Mapping[str, float | int]
FLUSH_S = 5  # seconds after which TensorBoard's readers see new events, at the latest


class MetricsWriter:
    """Rows of metrics, appended to `metrics.jsonl` and sent to TensorBoard.

    One JSON object a line, `{"step": 3, "epoch": 1, "train/loss": 23.4}`. Floats are written with
    all digits, so that two runs can be compared to the last bit. JSON has no NaN and no infinity:
    they are the strings "nan", "inf" and "-inf", which Python's `float` reads.

    A full disk does not end the run: rows wait in memory until they can be written; TensorBoard,
    which cannot recover, is given up with a warning.
    """

    def __init__(
        self, folder: Path, *, tensorboard: bool, resumed_step: int | None, offset: int | None
    ) -> None:
        """Continue the files of `folder` after `resumed_step`, or begin (None).

        `offset` is the result of `offset()` at the checkpoint: later rows are cut off. Where it is
        None, rows after `resumed_step` are cut off (all, if that is None). So is a half line.
        """
        self.path = folder / "metrics.jsonl"
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._pending = b""
        self._warned = False
        size = _rows_to_keep(self.path, resumed_step, offset)
        if offset is not None and size < offset:
            logger.warning("%s is shorter than at the checkpoint: some rows are lost", self.path)
        self._file.truncate(size)
        self._file.seek(size)
        self._events: Any = None
        if tensorboard:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter

            # Hides the rows that an interrupted run wrote after the checkpoint.
            purge = 0 if resumed_step is None else resumed_step + 1
            self._events = SummaryWriter(str(folder), purge_step=purge, flush_secs=FLUSH_S)
            self._summary, self._point = Summary, Summary.Value

    def scalars(self, row: Row) -> None:
        """Write one row: `step`, `epoch` and any metrics by name."""
        values = {name: _plain(value) for name, value in row.items()}
        text = {name: _as_json(value) for name, value in values.items()}
        self._pending += json.dumps(text, allow_nan=False).encode() + b"\n"
        self._drain()
        shown = {n: v for n, v in values.items() if n not in ("step", "epoch")}
        if self._events is not None and shown:
            # One event for the row: `add_scalar` for each figure costs ten times as much.
            points = [self._point(tag=name, simple_value=v) for name, v in shown.items()]
            self._guarded(
                self._events.file_writer.add_summary, self._summary(value=points), int(row["step"])
            )

    def image(self, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
        """A picture `[H, W, 3]` of bytes, in TensorBoard only."""
        self._send("add_image", tag, image, step, dataformats="HWC")

    def histogram(self, tag: str, values: npt.NDArray[np.float64], step: int) -> None:
        """The distribution of `values` `[m]`, in TensorBoard only."""
        self._send("add_histogram", tag, values, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown, in TensorBoard only."""
        self._send("add_text", tag, text, step)

    def flush(self) -> None:
        """Let readers of TensorBoard see everything now, and not only some seconds later.

        Waits for the disk. Rows of `metrics.jsonl` are seen at once.
        """
        self._drain()
        self._send("flush")

    def offset(self) -> int:
        """Bytes of `metrics.jsonl` with all rows so far; those in memory count too."""
        self.flush()
        return self._file.tell() + len(self._pending)

    def sync(self) -> None:
        """Wait until the rows written so far are on disk; from any thread. Raises `OSError`."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the pending rows and close the files."""
        self.flush()
        self._send("close")
        self._file.close()

    def _drain(self) -> None:
        try:
            while self._pending:
                written = self._file.write(self._pending)
                self._pending = self._pending[written or 0 :]
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning("%s cannot be written, rows wait in memory: %s", self.path, error)
        self._warned = True

    def _send(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._events is not None:
            self._guarded(getattr(self._events, method), *args, **kwargs)

    def _guarded(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            action(*args, **kwargs)
        except OSError as error:
            logger.warning("TensorBoard events end here: %s", error)
            self._events = None


def read_metrics(path: Path) -> Iterator[dict[str, float | int]]:
    """The rows of a `metrics.jsonl`, numbers restored; a half-written last line is left out."""
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield {
                name: float(value) if isinstance(value, str) else value
                for name, value in json.loads(line).items()
            }


def _rows_to_keep(path: Path, step: int | None, offset: int | None) -> int:
    """Bytes of the whole rows before `offset`, or, without it, of those up to `step`."""
    kept = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or (offset is not None and kept + len(line) > offset):
                break
            if offset is None and (step is None or _step_of(line) > step):
                break
            kept += len(line)
    return kept


def _step_of(line: bytes) -> float:
    """The step of a row; a damaged one is later than all."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _plain(value: float | int) -> float | int:
    return value if type(value) is int else float(value)


def _as_json(value: float | int) -> float | int | str:
    return value if math.isfinite(value) else str(value)
