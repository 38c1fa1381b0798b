from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp_ssl.logs import console, writer
from ddp_ssl.logs.loggers import load_loggers
from ddp_ssl.logs.tensorboard import LAYOUT
from ddp_ssl.run import environment, status
from ddp_ssl.utils import text


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("ddp_ssl")
    before = list(root.handlers), root.level, ours.level
    yield
    for handler in set(root.handlers) - set(before[0]):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[1])
    ours.setLevel(before[2])
    logging.captureWarnings(False)


def writer_of(folder: Path, step: int | None = None, offset: int | None = 0, **more: Any) -> Any:
    return writer.MetricsWriter(folder, resumed_step=step, offset=offset, **more)


TENSORBOARD: Any = load_loggers(["tensorboard"])


def rows_of(folder: Path) -> list[dict[str, float | int]]:
    return list(writer.read_metrics(folder / "metrics.jsonl"))


def write(writer: writer.MetricsWriter, steps: range, value: float = 0.0) -> None:
    for step in steps:
        writer.scalars({"step": step, "epoch": 1, "train/loss": value + step})


# --- metrics.jsonl ---------------------------------------------------------------------------


def test_floats_are_exact_and_not_a_number_is_valid_json(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, np.float32(0.1), 3]
    row = {f"x/{i}": v for i, v in enumerate(values)}
    odd = {"y/nan": math.nan, "y/inf": math.inf, "y/ninf": -math.inf}
    writer = writer_of(tmp_path)
    writer.scalars({"step": 4, "epoch": 1, **row, **odd})
    writer.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    raw = json.loads(text, parse_constant=refuse)
    assert text.count("\n") == 1
    assert [raw["y/nan"], raw["y/inf"], raw["y/ninf"]] == ["nan", "inf", "-inf"]
    (read,) = rows_of(tmp_path)
    assert list(read)[:2] == ["step", "epoch"]
    for name, value in row.items():
        assert repr(read[name]) == repr(value if type(value) is int else float(value))
    assert math.isnan(read["y/nan"])
    assert [read["y/inf"], read["y/ninf"]] == [math.inf, -math.inf]


def test_rows_are_seen_at_once(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    write(writer, range(3))
    assert len(rows_of(tmp_path)) == 3
    writer.close()


def test_resuming_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    write(writer, range(1, 4))
    offset = writer.offset()
    assert offset == (tmp_path / "metrics.jsonl").stat().st_size
    writer.scalars({"step": 3, "epoch": 1, "eval/knn_top1": 0.5})  # after the checkpoint
    write(writer, range(4, 9))
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "epo')

    writer = writer_of(tmp_path, 3, offset)
    write(writer, range(4, 6), 100.0)
    writer.close()
    assert [row["train/loss"] for row in rows_of(tmp_path)] == [1, 2, 3, 104, 105]


@pytest.mark.parametrize("tail", ["", '{"step": 9, "epo', "\0\0\0\0\n"])
def test_resuming_without_an_offset_cuts_by_step(tail: str, tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    write(writer, range(1, 9))
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    writer = writer_of(tmp_path, 5, None)
    write(writer, range(6, 7), 100.0)
    assert writer.offset() == (tmp_path / "metrics.jsonl").stat().st_size
    writer.close()
    assert [row["train/loss"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 106]


def test_a_half_written_line_goes(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    write(writer, range(1, 3))
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3')
    assert len(rows_of(tmp_path)) == 2
    writer_of(tmp_path, 3, None).close()
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    assert len(rows_of(tmp_path)) == 2


def test_a_fresh_start_begins_anew(tmp_path: Path) -> None:
    write(writer_of(tmp_path), range(5))
    writer_of(tmp_path, None, 0).close()
    assert rows_of(tmp_path) == []


def test_an_offset_beyond_the_end_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = writer_of(tmp_path)
    write(writer, range(1, 3))
    writer.close()
    writer_of(tmp_path, 2, 10_000).close()
    assert "some rows are lost" in caplog.text
    assert len(rows_of(tmp_path)) == 2


class FullDisk:
    """A raw file with `room` bytes left."""

    def __init__(self, file: io.FileIO, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_delays_rows_and_loses_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_of(tmp_path)
    disk = FullDisk(writer._file, 70)
    writer._file = disk
    write(writer, range(1, 4))
    assert len(rows_of(tmp_path)) == 1
    promised = writer.offset()
    disk.room = 10**6
    write(writer, range(4, 5))
    writer.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text[:promised].count("\n") == 3
    assert text[promised - 1] == "\n"
    assert caplog.text.count("rows wait in memory: [Errno 28]") == 1


@pytest.mark.parametrize(
    ("damage", "said", "left"),
    [
        (lambda t: t, "", [1, 2, 3, 4, 5, 6]),
        (lambda t: t.replace(b'{"step": 3,', b'{"step~ 3,'),
         "a line after step 2 cannot be read; the rows of steps 3 are lost", [1, 2, 4, 5, 6]),
        (lambda t: t.replace(b'"step": 3', b'"step": 1'),
         "a line after step 2 cannot be read; the rows of steps 3 are lost", [1, 2, 4, 5, 6]),
        (lambda t: t.replace(b'"step": 3', b'"step": 6'),
         "a line after step 2 cannot be read; the rows of steps 3 are lost", [1, 2, 4, 5, 6]),
        (lambda t: t.replace(b'"train/loss": 4.0', b'"train/loss": 5.0'),
         "every line can be read, but a figure is another", [1, 2, 3, 4, 5, 6]),
        (lambda t: t[:80] + t[100:], "a line after step 1 cannot be read", None),
        (lambda t: t[:130],
         "after step 3 cannot be read; the rows of steps 4-6 are lost", [1, 2, 3]),
        (lambda t: b"", "the rows of steps 1-6 are lost", []),
    ],
)  # fmt: skip
def test_rows_that_changed_since_the_checkpoint_are_named(
    damage: Callable[[bytes], bytes], said: str, left: list[int] | None, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    before = writer_of(tmp_path)
    write(before, range(1, 7))
    offset, crc = before.offset(), before.crc
    write(before, range(7, 9))
    before.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    changed = path.read_bytes()
    after = writer_of(tmp_path, 6, offset, crc=crc)
    assert said in caplog.text if said else not caplog.text
    steps = [row["step"] for row in rows_of(tmp_path)]
    assert steps == left if left is not None else set(steps) < set(range(1, 7))
    assert after.crc == zlib.crc32(path.read_bytes())
    after.close()
    writer_of(tmp_path, 6, offset, crc=crc).close()  # again, before the next checkpoint
    damaged = tmp_path / "metrics.jsonl.damaged"
    assert not damaged.exists() or damaged.read_bytes() == changed


def test_rows_that_cannot_be_written_at_the_end_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = writer_of(tmp_path)
    rows._file = FullDisk(rows._file, 70)
    write(rows, range(1, 4))
    rows.close()
    assert caplog.text.count("rows wait in memory") == 1
    assert "the last 2 rows could not be written" in caplog.text


def test_a_log_that_cannot_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk, and where it cannot even be opened."""
    (tmp_path / "train.log").symlink_to("/dev/full")
    (tmp_path / "other/train.log").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "other"):
        console.setup_logging(folder, 0)
        for number in range(3):
            logging.getLogger("ddp_ssl").info("line %d", number)
        console.setup_logging(None, 0)
        text = capsys.readouterr().err
        assert text.count("train.log: cannot be written, lines are on the console only") == 1
        assert [f"line {n}" in text for n in range(3)] == [True] * 3
        assert "Traceback" not in text


# --- TensorBoard -----------------------------------------------------------------------------


def scalars_in(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    points = [(e.step, e.value) for e in events.Scalars(tag)]
    assert len(dict(points)) == len(points), "duplicate points"
    return dict(points)


def test_tensorboard_has_each_step_once_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1_700_000_000, 1_800_000_000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))  # event files are sorted by second
    writer = writer_of(tmp_path, loggers=TENSORBOARD)
    write(writer, range(10))
    writer.close()
    assert scalars_in(tmp_path, "train/loss") == {s: s for s in range(10)}

    writer = writer_of(tmp_path, 5, None, loggers=TENSORBOARD)
    write(writer, range(6, 8), 100.0)
    writer.close()
    expected = {s: float(s) for s in range(6)} | {6: 106.0, 7: 107.0}
    assert scalars_in(tmp_path, "train/loss") == expected
    assert {r["step"]: r["train/loss"] for r in rows_of(tmp_path)} == expected

    writer = writer_of(tmp_path, None, 0, loggers=TENSORBOARD)  # died before its first checkpoint
    write(writer, range(2), 200.0)
    writer.close()
    assert scalars_in(tmp_path, "train/loss") == {0: 200.0, 1: 201.0}


def test_tensorboard_gets_pictures_and_text_and_sees_them_after_a_flush(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = writer_of(tmp_path, loggers=TENSORBOARD)
    writer.loggers.image("data/views", np.zeros((8, 12, 3), dtype=np.uint8), 0)
    writer.loggers.text("config", "`a: 1`", 0)
    writer.scalars({"step": 1, "epoch": 1, "a/b": math.nan})
    writer.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("data/views")
    assert (image.width, image.height) == (12, 8)
    assert "config/text_summary" in events.Tags()["tensors"]
    assert math.isnan(events.Scalars("a/b")[0].value)
    assert "step" not in events.Tags()["scalars"]
    writer.close()


def test_tensorboard_shows_what_matters_first_and_no_constants(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = writer_of(tmp_path, loggers=TENSORBOARD)
    for bad in (0, 2):
        row = {"train/loss": 1.0, "eval/knn_bank": 50, "run/bad_images": bad}
        writer.scalars({"step": bad, "epoch": 1, **row})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["run/bad_images", "train/loss"]
    assert [event.step for event in events.Scalars("run/bad_images")] == [2]
    (layout,) = events.Tensors("custom_scalars__config__")
    text = layout.tensor_proto.string_val[0].decode(errors="replace")
    assert text.index("Does it learn?") < text.index("Does it collapse?")
    for tag in (tag for charts in LAYOUT.values() for tag in charts.values()):
        assert tag in text


def test_tensorboard_that_fails_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_of(tmp_path, loggers=TENSORBOARD)
    board = writer.loggers._loggers["tensorboard"]
    real = board._events

    class Broken:
        @property
        def file_writer(self) -> Broken:
            return self

        def add_summary(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    board._events = Broken()
    write(writer, range(3))
    writer.loggers.image("x", np.zeros((2, 2, 3), dtype=np.uint8), 0)
    writer.close()
    real.close()
    assert len(rows_of(tmp_path)) == 3
    assert caplog.text.count("log.to: tensorboard ends here") == 1


# --- the console -----------------------------------------------------------------------------

ROW = {
    "step": 15,
    "epoch": 3,
    "train/loss": 23.412,
    "perf/images_per_s": 1234.4,
    "perf/step_ms": 933.0,
    "perf/data_wait": 0.031,
    "perf/memory_gib": 1.2345,
}


def test_the_progress_line() -> None:
    assert console.line(ROW, 12, 60, 0.933) == (
        "epoch   3/12  step  15/60  loss 23.41  1234 img/s  data wait 3 %  eta 0:42  mem 1.2 GiB"
    )
    assert "  alpha 0.500  " in console.line({**ROW, "rep/alpha": 0.5}, 12, 60, 1.0)
    assert console.line({"step": 0, "epoch": 0}, 12, 60, None) == "epoch   0/12  step   0/60"
    assert "loss nan" in console.line({**ROW, "train/loss": math.nan}, 12, 60, 1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (2 * 86400 + 3723, "2 d 01:02:03")],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_the_estimate_does_not_mind_one_slow_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddp_ssl")
    progress = console.ProgressLine(epochs=10, steps_per_epoch=10)
    for step, milliseconds in enumerate([1000, 1000, 90_000, 1000, 1000], 1):
        progress.update({"step": step, "epoch": 1, "perf/step_ms": milliseconds})
    assert "eta 1:35" in caplog.messages[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk(folder: Path | None, rank: int) -> None:
    console.setup_logging(None, rank)
    console.setup_logging(folder, rank)
    progress = console.ProgressLine(12, 5)
    logging.getLogger("ddp_ssl").info("hello")
    progress.update({"step": 5, "epoch": 1})
    progress.update({"step": 10, "epoch": 2})
    logging.getLogger("ddp_ssl.training").warning("careful")
    logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("ddp_ssl").error("gone")


FIRST, SECOND = "epoch   1/12  step   5/60", "epoch   2/12  step  10/60"


def test_a_file_gets_one_line_per_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    talk(tmp_path, 0)
    lines = ["hello", FIRST, SECOND, "warning: careful", "error: gone"]
    assert sys.stderr.getvalue().splitlines() == lines  # type: ignore[attr-defined]
    kept = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in kept] == [
        "INFO hello", f"INFO {FIRST}", f"INFO {SECOND}", "WARNING careful", "ERROR gone"
    ]  # fmt: skip


def test_a_terminal_rewrites_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    talk(None, 0)
    assert sys.stderr.getvalue() == (  # type: ignore[attr-defined]
        f"hello\n\r\x1b[K{FIRST}\r\x1b[K{SECOND}\nwarning: careful\nerror: gone\n"
    )


def test_other_ranks_tell_errors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    talk(tmp_path, 3)
    assert sys.stderr.getvalue() == "[rank 3] error: gone\n"  # type: ignore[attr-defined]
    assert not (tmp_path / "train.log").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_are_shown_by_rank_0_only(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        console.setup_logging(None, rank)
        warnings.warn("slow path", UserWarning, stacklevel=1)
    shown = "UserWarning: slow path" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert shown == (rank == 0)


def test_the_log_file_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    talk(tmp_path, 0)
    talk(tmp_path, 0)
    assert (tmp_path / "train.log").read_text().count("hello") == 2


def test_markdown_table() -> None:
    assert "\n".join(text.markdown_lines([("", ""), ("k-NN top-1", "0.97"), ("a|b", "1")])) == (
        "|            |      |\n"
        "|------------|------|\n"
        "| k-NN top-1 | 0.97 |\n"
        "| a\\|b       | 1    |"
    )


# --- the folder ------------------------------------------------------------------------------


def test_status_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status.write_status(tmp_path, "running")
    status.write_status(tmp_path, "preempted", step=15, epoch=3)
    written = json.loads((tmp_path / "status.json").read_text())
    assert (written["state"], written["step"], written["epoch"]) == ("preempted", 15, 3)
    assert "time" in written

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        status.write_status(tmp_path, "done")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"
    monkeypatch.undo()
    status.write_status(tmp_path, "done")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["status.json"]


def test_environment_tells_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JWT", "secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = environment.environment()
    assert "secret" not in json.dumps(found)
    assert found["variables"]["SLURM_JOB_ID"] == "17"
    assert found["packages"]["torch"].startswith("2.")
    assert found["python"].startswith("3.")
    assert found["cpus"] >= 1
    assert found["command"]


def test_no_commit_is_claimed_for_code_that_git_does_not_track(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.environment()["git_commit"] is None
    monkeypatch.setenv("PATH", "")
    assert environment.environment()["git_commit"] is None
