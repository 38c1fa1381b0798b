"""`metrics.jsonl` and TensorBoard: rows of metrics for programs.

Single-process: the recorder gives only rank 0 a writer. Metrics are named `group/name`
(`train/ optim/ rep/ eval/ perf/`) and are the same in `metrics.jsonl` and in TensorBoard.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddp_ssl.utils.files import if_readable, json_mapping, replaced, sync
from ddp_ssl.utils.launcher import ranges

logger = logging.getLogger("ddp_ssl")

Row = Mapping[str, float | int]

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


class MetricsWriter:
    """Rows of metrics, appended to `metrics.jsonl` and sent to TensorBoard.

    One JSON object a line, `{"step": 3, "epoch": 1, "train/loss": 23.4}`. Floats are written with
    all digits, so that two runs can be compared to the last bit. JSON has no NaN and no infinity:
    they are the strings "nan", "inf" and "-inf", which Python's `float` reads.

    A full disk does not end the run: rows wait in memory until they can be written, which is said
    once. TensorBoard, which cannot recover, is given up with a warning.

    TensorBoard gets no figure that is one number for a whole run (`UNSHOWN`, no bad images).
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        resumed_step: int | None,
        offset: int | None,
        crc: int | None = None,
    ) -> None:
        """Continue the files of `folder` after `resumed_step`, or begin (None).

        `offset` and `crc` are those of this writer at the checkpoint: later rows are cut off. A
        file that has changed since is mended, and a warning says which rows are lost. Where
        `offset` is None, rows after `resumed_step` are cut off (all, if that is None). So is a half
        line. Raises `OSError` with the path of a file that cannot be written.
        """
        self.path = folder / "metrics.jsonl"
        self._pending = b""
        self._warned = False
        try:
            if offset:
                mend(self.path, resumed_step or 0, offset, crc)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            size, self.crc = _rows_to_keep(self.path, resumed_step, offset)
            self._file.truncate(size)
            self._file.seek(size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._events: Any = None
        if tensorboard:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter

            # Hides the rows that an interrupted run wrote after the checkpoint.
            purge = 0 if resumed_step is None else resumed_step + 1
            self._events = SummaryWriter(str(folder), purge_step=purge, flush_secs=FLUSH_S)
            self._summary, self._point = Summary, Summary.Value
            charts = {
                group: {title: ["Multiline", [f"^{tag}$"]] for title, tag in parts.items()}
                for group, parts in LAYOUT.items()
            }
            self._send("add_custom_scalars", charts)

    def scalars(self, row: Row) -> None:
        """Write one row: `step`, `epoch` and any metrics by name."""
        values = {name: _plain(value) for name, value in row.items()}
        text = {name: _as_json(value) for name, value in values.items()}
        line = json.dumps(text, allow_nan=False).encode() + b"\n"
        self._pending, self.crc = self._pending + line, zlib.crc32(line, self.crc)
        self._drain()
        shown = {n: v for n, v in values.items() if n not in UNSHOWN and not _says_nothing(n, v)}
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
        """Wait until the rows written so far are on disk; from any thread."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s: its newest rows may not be on disk: %s", self.path, error)

    def close(self) -> None:
        """Write the pending rows and close the files; an error says which rows are lost."""
        self.flush()
        self._send("close")
        try:
            self._file.close()
        except OSError as error:
            self._warn(error)
        if rows := self._pending.count(b"\n"):
            logger.error("%s: the last %d rows could not be written", self.path, rows)

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
    """The rows of a `metrics.jsonl`, numbers restored; a half-written last line is left out.

    Raises `ValueError`, one line, for a line that is no row of numbers.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = {name: _as_number(value) for name, value in json_mapping(line).items()}
            except ValueError:
                row = {}
            if not row:
                raise ValueError(f"{path}: a line is no row of metrics: line {number}")
            yield row


def mend(path: Path, step: int, offset: int, crc: int | None) -> None:
    """Compare the rows with those at a checkpoint of `step`, and drop those that cannot be read.

    `offset` bytes with the checksum `crc` (None: unknown) were there. A changed file is kept as
    `metrics.jsonl.damaged`. Raises `OSError`.
    """
    now = size = 0
    with open(path, "a+b") as file:
        file.seek(0)
        while block := file.read(min(1 << 20, offset - size)):
            now, size = zlib.crc32(block, now), size + len(block)
        if (now, size) == (crc, offset):
            return
        file.seek(0)
        text = file.read(offset)
    kept: list[bytes] = []
    steps, unreadable = [0], set()
    lines = text.splitlines(keepends=True)
    ats = [_step_of(line) for line in lines]
    for i, (line, at) in enumerate(zip(lines, ats, strict=True)):
        whole = line.endswith(b"\n")
        # Where the next two rows are earlier, this one's step is wrong, not theirs.
        too_late = at > max(ats[i + 1 : i + 3], default=math.inf)
        if whole and steps[-1] <= at <= step and not too_late:
            kept.append(line)
            steps.append(int(at))
        elif at < steps[-1] or too_late or (at == math.inf and (whole or steps[-1] < step)):
            unreadable.add(steps[-1])
    first = steps[1] if kept else 1  # a run that continued another's begins later
    lost = set(range(first, step + 1)) - set(steps)
    problems = [f"a line after step {at} cannot be read" for at in sorted(unreadable)]
    if lost:
        problems.append(f"the rows of steps {ranges(lost)} are lost")
    elif len(text) < offset:
        problems.append("it is shorter, some rows are lost")
    if not problems and crc is not None:
        problems.append("every line can be read, but a figure is another")
    if problems:
        logger.warning("%s has changed since the checkpoint: %s", path, "; ".join(problems))
    if b"".join(kept) != text:
        with replaced(path) as temporary:
            temporary.write_bytes(b"".join(kept))
            sync(temporary)
            damaged = path.with_name(path.name + ".damaged")
            if not damaged.exists():  # of an earlier start from the same checkpoint
                shutil.copyfile(path, damaged)
                sync(damaged)


def _rows_to_keep(path: Path, step: int | None, offset: int | None) -> tuple[int, int]:
    """Bytes of the whole rows before `offset`, or, without it, of those up to `step`; their crc."""
    kept = crc = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or (offset is not None and kept + len(line) > offset):
                break
            if offset is None and (step is None or _step_of(line) > step):
                break
            kept, crc = kept + len(line), zlib.crc32(line, crc)
    return kept, crc


def _step_of(line: bytes) -> float:
    """The step of a row; a damaged one is later than all."""
    step = if_readable(lambda: int(json.loads(line)["step"]))
    return math.inf if step is None else step


def _says_nothing(name: str, value: float | int) -> bool:
    return name == "run/bad_images" and value == 0


def _plain(value: float | int) -> float | int:
    return value if type(value) is int else float(value)


def _as_number(value: Any) -> float | int:
    """A number as `_as_json` wrote it; raises `ValueError`."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return float(value)
    raise ValueError


def _as_json(value: float | int) -> float | int | str:
    return value if math.isfinite(value) else str(value)
