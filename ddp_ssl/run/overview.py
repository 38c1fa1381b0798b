"""What a run folder tells about its run, read quickly and without torch. Nothing is written."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ddp_ssl.run import claims
from ddp_ssl.run.witness import DIED
from ddp_ssl.utils.files import if_readable, json_file, json_mapping

DEEPEST = 4  # folders below the one that is searched: a sweep's runs are two below `runs`
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are read at first
LONGEST_TAIL = 1 << 20  # and at most, to find the last measurement
WINDOW = 1 << 12  # bytes of it in which a step is searched row by row
COLLAPSED = 0.05  # of the standard deviation of an isotropic embedding

State = Literal["training", "stale", "dead", "stopped", "done", "failed", "not started"]
STATES: dict[str, State] = {"preempted": "stopped", "done": "done", "failed": "failed"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Overview:
    """A run in a line."""

    folder: Path
    state: State
    """`training`: its process is alive. `stale`: it is silent for longer than a slow file system
    explains. `dead`: it ended without a word. `not started`: the folder is no run's."""
    collapsed: bool
    """Whether the embeddings hardly differed when they were last measured."""
    step: int
    epoch: int | None
    epochs: int | None
    metric: str | None
    """Name of the figure whose best value is kept, `checkpoint.best`."""
    best: float | None
    changed: float
    """When it last wrote, in seconds since 1970."""
    error: str | None = field(default=None, repr=False)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / "status.json").is_file()


def find_runs(folder: Path) -> list[Path]:
    """The run folders in a folder, and the folder itself if it is one. May raise `OSError`."""
    return [Path(path) for path in sorted(_runs_in(os.fspath(folder), 0))]


def _runs_in(folder: str, depth: int) -> Iterator[str]:
    with os.scandir(folder) as entries:
        listed = list(entries)
    if any(entry.name == "status.json" for entry in listed):
        yield folder
    elif depth < DEEPEST:
        for entry in listed:
            if not entry.name.startswith(".") and entry.is_dir():
                with contextlib.suppress(OSError):  # another user's, or removed meanwhile
                    yield from _runs_in(entry.path, depth + 1)


def overview(folder: Path, me: claims.Holder, now: float) -> Overview:
    """A run's overview; damaged files tell nothing. `me`: this process, `now`: the time."""
    status = json_file(folder / "status.json")
    config = if_readable(lambda: (folder / "config.yaml").read_text(errors="replace")) or ""
    metrics = folder / "metrics.jsonl"
    last: Row = {}
    std = best = None
    metric = _value(config, "best")
    with contextlib.suppress(OSError), open(metrics, "rb") as file:
        last, std = _tail(file)
        if metric not in (None, "null"):
            best = _best(file, folder, str(metric).lstrip("-"))
    said = str(status.get("state"))
    state: State
    life = claims.life(folder, me, now)
    if not is_run(folder):
        state = "not started"
    elif life == "over":
        state = "dead" if status.get("error") == DIED else STATES.get(said, "dead")
    else:
        state = "training" if life == "alive" else "stale"
    epochs = _value(config, "epochs")
    return Overview(
        folder=folder,
        state=state,
        collapsed=_collapsed(std, config),
        step=max(_whole(last.get("step")), _whole(status.get("step"))),
        epoch=_whole(last["epoch"]) if "epoch" in last else None,
        epochs=int(epochs) if epochs and epochs.isdecimal() else None,
        metric=None if metric == "null" else metric,
        best=best,
        changed=max(_changed(folder / "status.json"), _changed(metrics)),
        error=status.get("error"),
    )


# --- files ---------------------------------------------------------------------------------------


def _changed(path: Path) -> float:
    return if_readable(lambda: path.stat().st_mtime) or 0.0


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _number(value: Any) -> float | None:
    """A figure; not finite ones are written as text."""
    return if_readable(lambda: float(value))


def _value(config: str, key: str) -> str | None:
    """The value of a key in a run's `config.yaml`: a key a line. To parse it all takes long."""
    match = re.search(rf"^  {key}: (\S+)", config, re.MULTILINE)
    return match[1] if match else None


def _collapsed(std: float | None, config: str) -> bool:
    """An isotropic embedding of width d has the standard deviation 1/sqrt(d) in each dimension."""
    match = re.search(r"^  projector: \[.*?(\d+)\]", config, re.MULTILINE)
    return bool(std is not None and match and std * int(match[1]) ** 0.5 < COLLAPSED)


def _tail(file: BinaryIO) -> tuple[Row, float | None]:
    """The last whole row, and the last measurement of the embeddings' spread after step 0."""
    end = file.seek(0, os.SEEK_END)
    size = TAIL
    while True:
        file.seek(max(end - size, 0))
        text = file.read(size)
        text = text[: text.rfind(b"\n") + 1]
        if end > size:  # the first line is cut
            text = text[text.find(b"\n") + 1 :]
        at = text.rfind(b'"rep/embedding_std"')
        if at >= 0 or size >= min(end, LONGEST_TAIL):
            break
        size = LONGEST_TAIL
    last = json_mapping(text[text.rfind(b"\n", 0, -1) + 1 :])
    measured: Row = {}
    if at >= 0:
        measured = json_mapping(text[text.rfind(b"\n", 0, at) + 1 : text.find(b"\n", at)])
    return last, _number(measured.get("rep/embedding_std")) if measured.get("step") else None


def _best(file: BinaryIO, folder: Path, metric: str) -> float | None:
    """The figure at the step of `best.pt`, found by bisection: rows come in the order of steps."""
    step = json_file(folder / "checkpoints" / "best.json").get("step")
    if not isinstance(step, int):
        return None
    low, high = 0, file.seek(0, os.SEEK_END)
    while high - low > WINDOW:
        middle = (low + high) // 2
        file.seek(middle)
        file.readline()
        at = json_mapping(file.readline()).get("step")
        if isinstance(at, int) and at < step:
            low = middle
        else:
            high = middle
    file.seek(low)
    if low:
        file.readline()
    for line in file:
        row = json_mapping(line)
        if _whole(row.get("step")) > step:
            return None
        if row.get("step") == step and metric in row:
            return _number(row[metric])
    return None
