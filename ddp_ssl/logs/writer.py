"""`metrics.jsonl`: rows of metrics for programs, which the loggers of `log.to` get too.

Single-process: the recorder gives only rank 0 a writer. Metrics are named `group/name`
(`train/ optim/ rep/ eval/ perf/`) and are the same in `metrics.jsonl` and for each logger.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddp_ssl.logs.loggers import Given, Logger, Loggers
from ddp_ssl.utils.files import if_readable, json_file, json_mapping, replace_text, replaced, sync
from ddp_ssl.utils.launcher import ranges

logger = logging.getLogger("ddp_ssl")

Row = Mapping[str, float | int]

GIVEN = "given.json"  # the last row given to loggers, though it may have been cut off since


class MetricsWriter:
    """Rows of metrics, appended to `metrics.jsonl` and given to the loggers.

    One JSON object a line, `{"step": 3, "epoch": 1, "train/loss": 23.4}`. Floats are written with
    all digits, so that two runs can be compared to the last bit. JSON has no NaN and no infinity:
    they are the strings "nan", "inf" and "-inf", which Python's `float` reads.

    A full disk does not end the run: rows wait in memory until they can be written, which is said
    once.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resumed_step: int | None,
        offset: int | None,
        crc: int | None = None,
        loggers: Mapping[str, type[Logger]] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Continue the files of `folder` after `resumed_step`, or begin (None).

        `offset` and `crc` are those of this writer at the checkpoint: later rows are cut off. A
        file that has changed since is mended, and a warning says which rows are lost. Where
        `offset` is None, rows after `resumed_step` are cut off (all, if that is None). So is a half
        line. `loggers`: those of `log.to`, which get `config`. Rows that they were given before are
        not given again. Raises `OSError` with the path of a file that cannot be written.
        """
        self.path = folder / "metrics.jsonl"
        self._pending = b""
        self._warned = False
        classes, given = loggers or {}, Given()
        if not all(kind.rewinds for kind in classes.values()):
            given = note_given(folder, self.path, offset)
        try:
            if offset:
                mend(self.path, resumed_step or 0, offset, crc)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            size, self.crc = _rows_to_keep(self.path, resumed_step, offset)
            self._file.truncate(size)
            self._file.seek(size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.loggers = Loggers(classes, folder, config or {}, resumed_step, given)

    def scalars(self, row: Row) -> None:
        """Write one row: `step`, `epoch` and any metrics by name."""
        values = {name: _plain(value) for name, value in row.items()}
        text = {n: value if math.isfinite(value) else str(value) for n, value in values.items()}
        line = json.dumps(text, allow_nan=False).encode() + b"\n"
        self._pending, self.crc = self._pending + line, zlib.crc32(line, self.crc)
        self._drain()
        self.loggers.row(values)

    def flush(self) -> None:
        """Let readers of the loggers see everything now, and not only some seconds later.

        Waits for the disk. Rows of `metrics.jsonl` are seen at once.
        """
        self._drain()
        self.loggers.flush()

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
        self.loggers.close()
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


def note_given(folder: Path, path: Path, offset: int | None) -> Given:
    """The rows after a checkpoint that loggers were given; they are still in the file `path`.

    They are about to be cut off, and fewer of them may be there at the next start. So `given.json`
    keeps the last one.
    """
    noted = json_file(folder / GIVEN)
    before = if_readable(lambda: Given(int(noted["step"]), frozenset(noted["names"]))) or Given()
    step, names = before.step, set(before.names)
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(offset or 0)
        for line in file:
            at = _step_of(line)
            if step <= at < math.inf:
                names = {*(names if at == step else ()), *json_mapping(line)}
                step = int(at)
    now = Given(step, frozenset(names - {"step", "epoch"}))
    try:
        if now != before:
            replace_text(folder / GIVEN, json.dumps({"step": now.step, "names": sorted(now.names)}))
    except OSError as error:
        logger.warning("%s cannot be written, loggers may get rows again: %s", GIVEN, error)
    return now


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


def _plain(value: float | int) -> float | int:
    return value if type(value) is int else float(value)


def _as_number(value: Any) -> float | int:
    """A number as it was written; raises `ValueError`."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return float(value)
    raise ValueError
