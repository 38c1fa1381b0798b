"""Lines for people: the console, `train.log`, and the progress line."""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_ssl.logs.writer import Row

logger = logging.getLogger("ddp_ssl")
NOT_WRITTEN = "cannot be written, lines are on the console only: %s"


def setup_logging(folder: Path | None, rank: int) -> None:
    """Send Python's logging to stderr and, on rank 0, to `folder/train.log`.

    Rank 0 shows INFO of this package and WARNING of others; other ranks show errors only, with
    their rank. The file has DEBUG too: the traceback of an error that is one line on the console.
    Call it again when the folder is known: it replaces its own handlers.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Console | _LogFile)]:
        root.removeHandler(handler)
        handler.close()
    console = _Console(rank)
    root.addHandler(console)
    if folder is not None and rank == 0:
        try:
            root.addHandler(_LogFile(folder / "train.log"))
        except OSError as error:
            logger.warning("%s: %s", error.filename, NOT_WRITTEN % error.strerror)
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.DEBUG)
    logging.captureWarnings(True)  # so that W processes do not print the same warning W times


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[Any]
else:
    _StreamHandler = logging.StreamHandler  # not subscriptable before Python 3.11


class _Console(_StreamHandler):
    """stderr: plain text, in a terminal one progress line that is rewritten."""

    def __init__(self, rank: int) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.INFO if rank == 0 else logging.ERROR)
        self._prefix = "" if rank == 0 else f"[rank {rank}] "
        self._open_line = False

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{self._prefix}{level}{super().format(record).rstrip()}"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            rewritten = self.stream.isatty() and getattr(record, "progress", False)
            start = "\r\x1b[K" if rewritten else "\n" if self._open_line else ""
            self.stream.write(start + self.format(record) + ("" if rewritten else "\n"))
            self._open_line = rewritten
            self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed
            super().flush()

    def close(self) -> None:
        if self._open_line:
            self.stream.write("\n")
        super().close()


class _LogFile(logging.FileHandler):
    """`train.log`: every line with time and level, appended to over restarts."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.setLevel(logging.DEBUG)
        self._failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that lines cannot be written; others come when there is room again."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failing:
            self._failing = True
            logger.warning("%s: %s", self.baseFilename, NOT_WRITTEN % error.strerror)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # lines that were kept back, which has been said
            super().close()


class ProgressLine:
    """The line of rank 0 at each logging step, on the console and in `train.log`."""

    WINDOW = 31

    def __init__(self, epochs: int, steps_per_epoch: int) -> None:
        self.epochs, self.total_steps = epochs, epochs * steps_per_epoch
        self._step_ms: deque[float] = deque(maxlen=self.WINDOW)

    def update(self, row: Row) -> None:
        """Show a row of metrics; `perf/step_ms` in it feeds the estimate of the time left."""
        if "perf/step_ms" in row:
            self._step_ms.append(row["perf/step_ms"])
        # The median: one interval with a slow file system or an evaluation must not count.
        step_s = statistics.median(self._step_ms) / 1000 if self._step_ms else None
        text = line(row, self.epochs, self.total_steps, step_s)
        logger.info("%s", text, extra={"progress": True})


def line(row: Row, epochs: int, total_steps: int, step_s: float | None) -> str:
    """`epoch  3/12  step   15/60  loss 23.41  1234 img/s  data wait 3 %  eta 0:42  mem 1.2 GiB`

    Missing metrics are left out; `step_s` is the time of a step, in seconds, for the estimate.
    """
    step = int(row["step"])
    parts = [
        f"epoch {int(row['epoch']):>{len(str(epochs)) + 1}}/{epochs}",
        f"step {step:>{len(str(total_steps)) + 1}}/{total_steps}",
    ]
    if "train/loss" in row:
        parts.append(f"loss {row['train/loss']:#.4g}")
    if "rep/alpha" in row:
        parts.append(f"alpha {row['rep/alpha']:.3f}")
    if "perf/images_per_s" in row:
        parts.append(f"{row['perf/images_per_s']:.0f} img/s")
    if "perf/data_wait" in row:
        parts.append(f"data wait {100 * row['perf/data_wait']:.0f} %")
    if step_s is not None:
        parts.append(f"eta {duration(step_s * max(total_steps - step, 0))}")
    if "perf/memory_gib" in row:
        parts.append(f"mem {row['perf/memory_gib']:.1f} GiB")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`0:42`, `1:02:03`, `2 d 03:04:05`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
