"""What a run tells: progress lines, `train.log`, `metrics.jsonl`, TensorBoard, its status.

Single-process: rank 0 writes, the engine sees to it. Figures are named `group/name`
(`train/ optim/ rep/ eval/ perf/`) and are the same in `metrics.jsonl` and in TensorBoard.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

logger = logging.getLogger("ddp_ssl")

Row = Mapping[str, float | int]
FLUSH_S = 5  # after which TensorBoard's readers see what was written, at the latest


# --- metrics ---------------------------------------------------------------------------------


class MetricsWriter:
    """Rows of figures, appended to `metrics.jsonl` and sent to TensorBoard.

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

        `offset` is what `offset()` gave at the checkpoint: later rows are cut off. Where it is
        None, rows after `resumed_step` are (all, if there is none). A half-written line goes too.
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

            # Hides what an interrupted run wrote after the checkpoint.
            purge = 0 if resumed_step is None else resumed_step + 1
            self._events = SummaryWriter(str(folder), purge_step=purge, flush_secs=FLUSH_S)
            self._summary, self._point = Summary, Summary.Value

    def scalars(self, row: Row) -> None:
        """Write one row: `step`, `epoch` and any figures by name."""
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
        """Write what is left and close the files."""
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


# --- the console -----------------------------------------------------------------------------


def setup_logging(folder: Path | None, rank: int) -> None:
    """Send Python's logging to stderr and, on rank 0, to `folder/train.log`.

    Rank 0 shows INFO of this package and WARNING of others; other ranks show errors only, with
    their rank. Call it again when the folder is known: it replaces what it set up before.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Console | _LogFile)]:
        root.removeHandler(handler)
        handler.close()
    console = _Console(rank)
    root.addHandler(console)
    if folder is not None and rank == 0:
        root.addHandler(_LogFile(folder / "train.log"))
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
    logging.captureWarnings(True)  # so that W processes do not say the same W times


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

    def close(self) -> None:
        if self._open_line:
            self.stream.write("\n")
        super().close()


class _LogFile(logging.FileHandler):
    """`train.log`: every line with time and level, appended to over restarts."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.setLevel(logging.INFO)


class Progress:
    """The line of rank 0 at each logging step, on the console and in `train.log`."""

    WINDOW = 31

    def __init__(self, epochs: int, steps_per_epoch: int) -> None:
        self.epochs, self.total_steps = epochs, epochs * steps_per_epoch
        self._step_ms: deque[float] = deque(maxlen=self.WINDOW)

    def update(self, row: Row) -> None:
        """Show a row of figures; `perf/step_ms` in it feeds the estimate of what is left."""
        if "perf/step_ms" in row:
            self._step_ms.append(row["perf/step_ms"])
        # The median: one interval with a slow file system or an evaluation must not count.
        step_s = statistics.median(self._step_ms) / 1000 if self._step_ms else None
        text = line(row, self.epochs, self.total_steps, step_s)
        logger.info("%s", text, extra={"progress": True})

    def tell(self, text: str) -> None:
        """Any other line for people."""
        logger.info("%s", text)


def line(row: Row, epochs: int, total_steps: int, step_s: float | None) -> str:
    """`epoch  3/12  step   15/60  loss 23.41  1234 img/s  data wait 3 %  eta 0:42  mem 1.2 GiB`

    What the row lacks is left out; `step_s` is the time of a step, in seconds, for the estimate.
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


def markdown_table(rows: list[tuple[str, str]]) -> str:
    """Rows of name and value as an aligned Markdown table, without a heading."""
    rows = [(name.replace("|", "\\|"), value.replace("|", "\\|")) for name, value in rows]
    left = max((len(name) for name, _ in rows), default=3)
    right = max((len(value) for _, value in rows), default=3)
    lines = [f"| {'':<{left}} | {'':<{right}} |", f"|{'-' * (left + 2)}|{'-' * (right + 2)}|"]
    lines += [f"| {name:<{left}} | {value:<{right}} |" for name, value in rows]
    return "\n".join(lines)


# --- the folder ------------------------------------------------------------------------------

State = Literal["running", "preempted", "done", "failed"]


def write_status(folder: Path, state: State, **fields: Any) -> None:
    """Replace `status.json` atomically; batch scripts decide from it whether to requeue."""
    status = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **fields}
    # A name of its own: where one process failed, another may write at the same time.
    temporary = folder / f"status.json.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        with open(temporary, "w") as file:
            file.write(json.dumps(status, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "status.json")
    finally:
        temporary.unlink(missing_ok=True)


PACKAGES = ("ddp_ssl", "torch", "torchvision", "timm", "nvidia-dali", "numpy", "tensorboard")

# Only what says where the job ran: environments hold secrets too.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "NCCL_ALGO",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "WORLD_SIZE",
)


def environment() -> dict[str, Any]:
    """What the run depends on besides its config: versions, hardware, commit, command, job."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_commit": _commit(),
        "command": shlex.join(sys.orig_argv),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def code_version() -> dict[str, str]:
    """What computes the numbers: versions of the packages and the commit, for checkpoints."""
    numeric = ("ddp_ssl", "torch", "torchvision", "timm", "numpy")
    versions = {
        name.lower(): version
        for name, version in sorted(_versions().items())
        if name.lower() in numeric or name.lower().startswith("nvidia-dali")
    }
    return versions | {"commit": _commit() or "none"}


def _versions() -> dict[str, str]:
    """Installed versions from the metadata: importing the packages would take seconds."""
    return {
        name: distribution.version
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"]) and name.lower().startswith(PACKAGES)
    }


def _commit() -> str | None:
    """The commit of the code that runs, `-dirty` if it was changed; None outside of git."""
    # An installed package may lie within somebody else's repository, which does not track it.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """What git prints about this package, or None."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
