"""Faults within a run that its own processes must survive or end by, in the pool of ranks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ddp_ssl.checkpoint import store
from ddp_ssl.config import ConfigError, Run
from ddp_ssl.distributed import World
from ddp_ssl.errors import CheckpointError
from ddp_ssl.logs import writer
from ddp_ssl.logs.tensorboard import UNSHOWN
from ddp_ssl.run import environment, folder, watchdog
from ddp_ssl.run.configure import load
from ddp_ssl.run.identity import whole_identity
from ddp_ssl.run.signals import REQUESTS, Keyboard, StopRequest
from ddp_ssl.training import build, checkpointer
from ddp_ssl.training.lifecycle import set_deadlines
from ddp_ssl.utils import launcher
from tests.helpers import VIT, config_of
from tests.outside_loggers import LINES
from tests.ranks import Ranks
from tests.runs import BARE, Whole, Writes, arguments, complaint, rows, status, train


def losses(place: Path) -> list[int]:
    return [row["step"] for row in rows(place) if "train/loss" in row]


# --- a file system that fails ------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    """Until not one block is free."""
    with open(place / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def read_only(place: Path) -> None:
    folder = str(place / "run/checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


ACTIONS = {
    "fill": fill,
    "free": lambda place: (place / "ballast").unlink(),
    "read only": read_only,
    "writable": lambda place: subprocess.run(["umount", place / "run/checkpoints"], check=True),
}


def train_with(args: list[str], at: dict[int, str], place: str) -> int | str:
    """Run; before step `s` rank 0 does `at[s]` to the file system at `place`."""

    def act(job: Any) -> None:
        if os.environ["RANK"] == "0" and job.state.step in at:
            writes.finish()
            ACTIONS[at[job.state.step]](Path(place))

    with Writes() as writes:
        return train(args, on_step=act)


@pytest.mark.parametrize(("break_it", "mend_it"), [("fill", "free"), ("read only", "writable")])
def test_a_failing_save_warns_and_is_made_up_for(
    ranks: Ranks, photos: Path, whole: Whole, small_disk: Path, break_it: str, mend_it: str
) -> None:
    """Full or read-only for four steps: the older checkpoint stays, no row is lost."""
    place = small_disk / "run"
    args = arguments(photos, place, *BARE, "checkpoint.every_steps=1")
    at = {3: break_it, 7: mend_it}
    assert ranks.launch(train_with, 2, args, at, str(small_disk)) == [0, 0]
    text = (place / "train.log").read_text()
    reason = {"fill": "No space left on device", "read only": "Read-only file system"}[break_it]
    assert "not saved (1 of 10 failures that end the run), going on: " in text
    assert reason in text
    assert status(place)["state"] == "done"
    assert losses(place) == list(range(1, 10))
    assert rows(place) == rows(whole(2, *BARE))
    assert store.find(place)[0].step == 9
    (small_disk / "ballast").unlink(missing_ok=True)


def test_a_stale_mount_is_waited_out(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    """Everything that looks at the run folder fails for four steps, the STOP file's place too.

    An epoch's validation falls into these steps, and its rows are as in the other run.
    """
    place = tmp_path / "run"
    args = arguments(photos, place, "checkpoint.every_steps=1")
    assert ranks.launch(train_on_a_stale_mount, 2, args, str(place)) == [0, 0]
    text = (place / "train.log").read_text()
    assert "not saved (4 of 10 failures that end the run), going on: " in text
    assert "Stale file handle" in text
    assert rows(place) == rows(whole(2))
    assert store.find(place)[0].step == 9


def train_on_a_stale_mount(args: list[str], place: str) -> int | str:
    step_now = [0]

    def watched(job: Any) -> None:
        writes.finish()
        step_now[0] = job.state.step

    def failing(function: Any) -> Any:
        def call(path: Any = ".", *rest: Any, **more: Any) -> Any:
            named = isinstance(path, str | Path) and str(path).startswith(place)
            if named and os.environ["RANK"] == "0" and 3 <= step_now[0] < 7:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return function(path, *rest, **more)

        return call

    with (
        Writes() as writes,
        patch.object(os, "stat", failing(os.stat)),
        patch.object(os, "scandir", failing(os.scandir)),
        patch.object(os, "mkdir", failing(os.mkdir)),
        patch.object(os, "replace", failing(os.replace)),
        patch("builtins.open", failing(open)),
    ):
        return train(args, on_step=watched)


def test_too_many_failing_saves_end_the_run_and_keep_the_good_one(
    ranks: Ranks, photos: Path, small_disk: Path
) -> None:
    place = small_disk / "run"
    more = (*BARE, "checkpoint.every_steps=1", "checkpoint.max_failures=3")
    args = arguments(photos, place, *more)
    assert ranks.launch(train_with, 2, args, {4: "fill"}, str(small_disk)) == [1, 1]
    newest = store.newest_good(place)
    assert newest is not None
    assert newest.step == 4
    (small_disk / "ballast").unlink()
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    assert losses(place) == list(range(1, 10))


def test_a_stop_insists_on_its_checkpoint(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """Two saves fail after the stop; the third one is there and no step is lost."""
    args = arguments(photos, tmp_path / "run", *BARE, "checkpoint.every_steps=0")
    assert ranks.launch(stopped_with_failing_saves, 1, args) == [0]
    assert status(tmp_path / "run")["state"] == "preempted"
    newest = store.newest_good(tmp_path / "run")
    assert newest is not None
    assert newest.step == status(tmp_path / "run")["step"] == losses(tmp_path / "run")[-1]


def stopped_with_failing_saves(args: list[str]) -> int | str:
    save, left = store.save, [2]

    def failing(*args: Any, **more: Any) -> Path:
        if left[0]:
            left[0] -= 1
            raise CheckpointError("step_1.pt: Stale file handle")
        return save(*args, **more)

    with (
        patch.object(store, "save", failing),
        patch.object(checkpointer, "SAVE_AGAIN_S", 0.01),
    ):
        return train(args, stop_at=1)


# --- one rank alone ----------------------------------------------------------------------------


def test_an_exception_in_one_ranks_validation_is_named(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run")
    codes = ranks.launch(broken_validation, 3, args)
    assert codes == ["1"] * 3
    error = status(tmp_path / "run")["error"]
    assert "ZeroDivisionError: not today" in error
    assert status(tmp_path / "run")["retry"] is True


def broken_validation(args: list[str]) -> int | str:
    from ddp_ssl.evals.validation import Validation

    original, calls = Validation.metrics, [0]

    def metrics(self: Any, *rest: Any, **more: Any) -> Any:
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == 2:
            raise ZeroDivisionError("not today")
        return original(self, *rest, **more)

    with patch.object(Validation, "metrics", metrics):
        return train(args)


def test_a_nan_on_one_rank_stops_all_together(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """Only rank 1's features are poisoned; with local norms, only its own loss at first."""
    more = ("model.batch_norm=local", *BARE)
    codes = ranks.launch(nan_on_one_rank, 3, arguments(photos, tmp_path / "run", *more))
    assert codes == [1, 1, 1]
    assert "at step 5 (epoch 2)" in status(tmp_path / "run")["error"]
    assert status(tmp_path / "run")["retry"] is False
    for found in store.find(tmp_path / "run"):
        assert found.step < 5


def nan_on_one_rank(args: list[str]) -> int | str:
    from ddp_ssl.data.loading.loader import TrainLoader

    original, seen = TrainLoader.__next__, [0]

    def poisoned(self: Any) -> Any:
        batch = original(self)
        seen[0] += len(self.views) > 1  # neither the warm-up's nor alpha's
        if os.environ["RANK"] == "1" and seen[0] == 5:
            batch.views[0] = batch.views[0] * float("nan")
        return batch

    with patch.object(TrainLoader, "__next__", poisoned):
        return train(args)


def test_the_slow_rank_is_named(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    args = arguments(photos, tmp_path / "run", *BARE)
    assert ranks.launch(slow_rank, 3, args) == [0, 0, 0]
    text = (tmp_path / "run/train.log").read_text()
    assert text.count(f"rank 2 ({socket.gethostname()}) is slow: the others wait ") == 1
    assert "rank 0 (" not in text
    skews = [row["perf/rank_skew"] for row in metrics(tmp_path / "run") if "perf/rank_skew" in row]
    assert len(skews) == 9
    assert sorted(skews)[4] > 0.3


def metrics(place: Path) -> list[dict[str, Any]]:
    return list(writer.read_metrics(place / "metrics.jsonl"))


def slow_rank(args: list[str]) -> int | str:
    from ddp_ssl.data.loading.loader import TrainLoader

    original = TrainLoader.__next__

    def slow(self: Any) -> Any:
        if os.environ["RANK"] == "2":
            time.sleep(0.5)
        return original(self)

    with patch.object(TrainLoader, "__next__", slow):
        return train(args)


# --- resuming ----------------------------------------------------------------------------------


def test_loggers_have_every_step_once_after_three_restarts(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    to = "log.to=[tensorboard, 'tests.outside_loggers:Lines']"
    args = arguments(photos, tmp_path / "run", to, "run.resume=auto")
    for death in (3, 6, 8):
        assert ranks.launch(train, 2, args, death) == ["killed"] * 2
    assert ranks.launch(train, 2, args) == [0, 0]
    assert len(list((tmp_path / "run").glob("events.out.*"))) == 4
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    written = [
        (row["step"], name)
        for row in metrics(tmp_path / "run")
        for name in row
        if name not in UNSHOWN and (name, row[name]) != ("run/bad_images", 0)
    ]
    assert len(set(written)) == len(written)
    shown = [(e.step, tag) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert sorted(shown) == sorted(written)
    lines = [json.loads(line) for line in (tmp_path / "run" / LINES).read_text().splitlines()]
    assert [line["rank"] for line in lines if "start" in line] == ["0"] * 4
    # The second computation of a step may have waited for another save.
    given, kept = (
        [(row["step"], {n for n in row if not n.startswith("perf/")}) for row in rows]
        for rows in ([line for line in lines if "step" in line], metrics(tmp_path / "run"))
    )
    assert given == kept


def test_changed_code_is_said_on_resume(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    args = arguments(photos, tmp_path / "run", *BARE, *VIT, "optim.name=adamw")
    assert ranks.launch(as_an_earlier_version, 1, args) == ["killed"]
    assert ranks.launch(with_other_torch, 1, [*args, "run.resume=auto"]) == [0]
    text = (tmp_path / "run/train.log").read_text()
    line = next(x for x in text.splitlines() if "the code has changed" in x)
    assert f"torch: {torch.__version__.partition('+')[0]} in the checkpoint, 9.9 now" in line
    assert "earlier version: from here on tokens and position embeddings are not decayed" in text


def as_an_earlier_version(args: list[str]) -> int | str:
    """The first steps of a run, by a version that did not know `optim.layer_decay`."""

    def identity(*of: Any) -> dict[str, str]:
        return {k: v for k, v in whole_identity(*of).items() if k != "optim.layer_decay"}

    with patch.object(build, "whole_identity", identity):
        return train(args, 5)


def with_other_torch(args: list[str]) -> int | str:
    code = environment.code_version() | {"torch": "9.9"}
    with patch.object(environment, "code_version", return_value=code):
        return train(args)


def test_all_ranks_load_the_file_that_rank_0_chose(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    """Rank 1 sees an older state of the folder, as over a network file system's cache."""
    args = arguments(photos, tmp_path / "run", *BARE)
    assert ranks.launch(train, 2, args, 5) == ["killed"] * 2
    stale = tmp_path / "stale"
    shutil.copytree(tmp_path / "run", stale)
    newest = store.find(tmp_path / "run")[0]
    state = torch.load(newest.path, weights_only=True)
    state["best"] = 0.123
    store.save(
        stale, state, step=newest.step, epoch=newest.epoch, identity=newest.identity,
        world_size=2, keep=2,
    )  # fmt: skip
    other = store.find(stale)[0].path
    results = ranks.launch(complaint_with_stale, 2, [*args, "run.resume=auto"], str(other))
    assert [code for code, _ in results] == [2, 2]
    assert "rank 0 reads" in results[0][1]
    assert "[rank 1]" in results[0][1]


def complaint_with_stale(args: list[str], other: str) -> tuple[int | str, str]:
    original = store.load

    def stale(path: Path, *rest: Any, **more: Any) -> Any:
        return original(Path(other) if os.environ["RANK"] == "1" else path, *rest, **more)

    with patch.object(store, "load", stale):
        return complaint(args)


def test_a_yaml_with_a_python_tag_is_refused(tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.yaml", tmp_path / "proof"
    path.write_text(f"run: {{seed: !!python/object/apply:os.system ['touch {proof}']}}\n")
    with pytest.raises(ConfigError, match=r"evil\.yaml: not valid YAML: .*python/object/apply"):
        load([str(path)])
    with pytest.raises(ConfigError, match="python/object/apply"):
        load([f"run.seed=!!python/object/apply:os.system ['touch {proof}']"])
    assert not proof.exists()


def test_run_folders_stay_where_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs/../../etc", "/data/runs/../x", "../a/../b"):
        with pytest.raises(ConfigError, match=r"run\.dir: .*leads back up"):
            folder.choose(config_of(f"run.dir={name}"))
    assert folder.choose(config_of("run.dir=../elsewhere")).folder == Path("../elsewhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "../../tmp/x")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    name = folder.default_name(config_of("method.name=tests.outside:Outside"))
    assert Path(name).name == name
    assert name.startswith("digits-outside-")


# --- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "STOP"])
def test_every_request_to_stop_loses_no_step(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path, what: str
) -> None:
    args = arguments(photos, tmp_path / "run", *BARE, "checkpoint.every_steps=0")
    (code,) = ranks.launch(stopped_by, 1, args, what, str(tmp_path / "run"))
    assert code == 0
    assert status(tmp_path / "run")["state"] == "preempted"
    stopped = status(tmp_path / "run")["step"]
    assert 4 <= stopped < 9
    assert losses(tmp_path / "run") == list(range(1, stopped + 1))
    log = (tmp_path / "run/train.log").read_text()
    assert f"stopped on {what} at step {stopped}; to go on: " in log
    assert f"-m ddp_ssl.resume {tmp_path / 'run'}" in log
    assert log.count("STOP: stopping as soon as possible") == (what == "STOP")
    assert log.count("first step: ") == 1
    assert ranks.launch(train, 1, [*args, "run.resume=auto"]) == [0]
    assert not (tmp_path / "run/STOP").exists()
    assert rows(tmp_path / "run") == rows(whole(1, *BARE))


def stopped_by(args: list[str], what: str, place: str) -> int | str:
    def fifth(job: Any) -> None:
        if job.state.step == 4 and what == "STOP":
            (Path(place) / "STOP").touch()
            time.sleep(1.1)  # it is looked for once a second
        elif job.state.step == 4:
            os.kill(os.getpid(), getattr(signal, what))

    return train(args, on_step=fifth)


def test_a_request_in_an_epochs_last_step_comes_before_the_validation(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run", "checkpoint.every_steps=0")
    assert ranks.launch(stopped_in_the_last_step, 2, args) == [0, 0]
    assert (status(tmp_path / "run")["step"], status(tmp_path / "run")["epoch"]) == (3, 0)
    assert not [r for r in rows(tmp_path / "run") if r["step"] == 3 and "eval/knn_top1" in r]
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    assert rows(tmp_path / "run") == rows(whole(2))


def stopped_in_the_last_step(args: list[str]) -> int | str:
    return train(args, stop_at=2 if os.environ["RANK"] == "1" else None)


def test_a_stop_made_before_the_start_counts_and_an_obeyed_one_does_not(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run", *BARE, "run.resume=auto")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").touch()
    assert ranks.launch(train, 1, args) == [0]
    assert status(tmp_path / "run")["state"] == "preempted"
    assert ranks.launch(train, 1, args) == [0]
    assert status(tmp_path / "run")["state"] == "done"
    assert not (tmp_path / "run/STOP").exists()


@pytest.mark.faults
def test_a_long_save_is_not_a_hang(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """The others wait for rank 0 longer than a step may take."""
    more = ("run.timeout_s=3", "checkpoint.every_steps=0", "eval.every=0", "measure.every=0")
    args = arguments(photos, tmp_path / "run", "optim.epochs=1", *more)
    assert ranks.launch(saving_slowly, 2, args) == [0, 0]


def saving_slowly(args: list[str]) -> int | str:
    save = store.save

    def slow(*args: Any, **more: Any) -> Path:
        time.sleep(6)
        return save(*args, **more)

    with patch.object(store, "save", slow):
        return train(args)


def test_what_goes_wrong_while_building_may_be_tried_again(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run", *BARE)
    assert ranks.launch(train, 2, args, 5) == ["killed"] * 2
    codes = ranks.launch(broken_restore, 2, [*args, "run.resume=auto"])
    assert codes == [2, "1"]
    assert status(tmp_path / "run")["retry"] is True
    assert "uncorrectable ECC error" in status(tmp_path / "run")["error"]


def broken_restore(args: list[str]) -> int | str:
    original = build.restore

    def broken(*rest: Any) -> None:
        if os.environ["RANK"] == "1":
            raise RuntimeError("CUDA error: uncorrectable ECC error")
        original(*rest)

    with patch.object(build, "restore", broken):
        return train(args)


# --- stopping in time --------------------------------------------------------------------------


@pytest.mark.faults
def test_deadlines(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """A run that may take 4 seconds stops by itself, and the rest follows."""
    args = arguments(photos, tmp_path / "run", "optim.epochs=400", "eval.every=0")
    hours = f"run.max_hours={8 / 3600}"
    assert ranks.launch(train, 2, [*args, hours]) == [0, 0]
    assert status(tmp_path / "run")["state"] == "preempted"
    assert "stopped on run.max_hours at step" in (tmp_path / "run/train.log").read_text()
    assert status(tmp_path / "run")["step"] == losses(tmp_path / "run")[-1] > 0


def test_a_slurm_job_stops_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def deadline(left: float, *settings: str) -> float:
        stop = StopRequest()
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(stop.started + left)))
        set_deadlines(config_of(*settings), stop)
        return stop._deadline - stop.started

    assert deadline(7200) == pytest.approx(7080, abs=2)
    assert deadline(7200, "run.end_margin_s=600") == pytest.approx(6600, abs=2)
    assert deadline(100) == pytest.approx(90, abs=2)  # a tenth of what is left
    assert deadline(7200, "run.max_hours=0.5") == pytest.approx(1800, abs=2)
    assert deadline(-5) <= 0  # past its end already: stops at the first step
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    assert launcher.job_end() is None


def test_the_earliest_deadline_asks_to_stop() -> None:
    stop = StopRequest()
    stop.at(stop.started + 3600, "the job's end")
    assert not stop.look_for(None)
    stop.at(stop.started, "run.max_hours")
    stop.at(stop.started + 60, "another one")
    assert stop.look_for(None)
    assert stop.reason == "run.max_hours"


def test_one_keystroke_reaches_a_worker_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    keyboard = Keyboard()
    keyboard.pressed(7.0)
    keyboard.pressed(7.1)  # torchrun passes on what the terminal sent too
    assert left == []
    keyboard.pressed(9.0)
    assert left == [130]


def test_a_second_ctrl_c_ends_a_process_that_is_blocked() -> None:
    """The main thread does not come back to Python, as in a collective that hangs."""
    program = (
        "import hashlib; from ddp_ssl.run.signals import StopRequest; StopRequest().install();"
        "print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    # Answered while the main thread is blocked.
    assert process.stderr.readline() == "stopping as soon as possible; Ctrl-C again stops now\n"
    time.sleep(1.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == ""


def test_other_signals_are_answered_once_and_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in REQUESTS}
    try:
        for rank, said in (("1", ""), ("0", "SIGTERM: stopping as soon as possible\n")):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            stop = StopRequest().install()
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
                time.sleep(0.1)  # for the thread
            assert stop.reason == "SIGTERM"
            assert capfd.readouterr().err == said
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_slow_step_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "SLOW_S", 0.05)
    watch = watchdog.Watchdog(
        World(0, 1, 0, 1, torch.device("cpu")), Run(timeout_s=0.1)
    )  # looks every 10 ms
    try:
        with caplog.at_level("INFO", "ddp_ssl"):
            watch.next("building the run")
            time.sleep(0.2)
            assert caplog.messages == []
            watch.at(7, "waiting for data")
            time.sleep(0.2)
            with watch.during("validation"):
                time.sleep(0.2)
    finally:
        watch.close()
    (line,) = caplog.messages
    assert re.fullmatch(r"step 8 has taken \d+ s so far, in: waiting for data", line)


DIES = """
import faulthandler, os, signal, socket, sys, time
from pathlib import Path
from ddp_ssl.config import Run
from ddp_ssl.run import claims, status
run, folder = status.RunStatus(), Path(sys.argv[1])
run.claim = claims.take(folder, Run())
run.begin(folder)
status.write_status(folder, "running", step=7)
(folder / f"status.json.{socket.gethostname()}-{os.getpid()}.tmp").touch()
if sys.argv[2] == "done":
    run.record("done", step=9)
    run.release()
elif sys.argv[2] == "replaced":
    run.claim.path.rename(folder / "claim-8.json")
    os.kill(os.getpid(), signal.SIGKILL)
else:
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL", "done", "replaced"])
def test_a_run_that_dies_leaves_a_truthful_status(tmp_path: Path, how: str) -> None:
    """Not over the status of a run that has the folder by then."""
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path), how], check=how == "done")
    if how == "done":
        assert status(tmp_path)["state"] == "done"
        assert not list(tmp_path.glob("claim-*"))
        return
    deadline = time.monotonic() + 30
    while list(tmp_path.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not list(tmp_path.glob("*.tmp"))
    if how == "replaced":
        time.sleep(0.2)
        assert status(tmp_path)["state"] == "running"
        return
    while status(tmp_path)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    found = status(tmp_path)
    assert (found["state"], found["retry"], found["step"]) == ("failed", True, 7)
    assert "rank 0 died" in found["error"]


# --- who it was --------------------------------------------------------------------------------


def note(beat: int, collectives: int = 7, **more: Any) -> watchdog.Heartbeat:
    return watchdog.Heartbeat("n1", beat, 3, collectives, "a step", **more)


def test_blame() -> None:
    before = [note(1), note(1), note(1)]
    assert watchdog.blame(before, [note(2), note(2), note(2)], 2) == ([], "")
    ranks, text = watchdog.blame(before, [note(2), note(1), note(2)], 2)
    assert ranks == [1]
    assert text == "rank 1 (n1) died or was stopped; last heard of after step 3"
    ranks, text = watchdog.blame(before, [note(2), note(2), note(2, 6)], 2)
    assert ranks == [2]
    assert text == "rank 2 (n1) hangs after step 3, in: a step"
    ranks, text = watchdog.blame(before, [note(2, error="OSError: no"), note(1), note(2)], 2)
    assert ranks == [0]
    assert text == "rank 0 (n1) failed after step 3: OSError: no"
    ranks, text = watchdog.blame(before, [note(1), note(1), note(2)], 2)
    assert ranks == [0, 1]
    assert text.startswith("rank 0 (n1) and 1 more died")


def test_a_hanging_rank_is_found_by_what_it_did_not_reach(ranks: Ranks) -> None:
    """Rank 1 lives but never comes to the barrier: found, and found by both alike."""
    (reason, speaks), (same, other_speaks) = ranks.run(hang, 2)
    assert "rank 1" in reason
    assert "in: a long nap" in reason
    assert speaks
    assert (same, other_speaks) == ("", True)  # the one that hangs finds nobody else


def hang(world: World) -> tuple[str, bool]:
    watch = watchdog.Watchdog(world, Run(timeout_s=5))
    watch.at(1, "a step")
    if world.rank == 1:
        watch.at(1, "a long nap")
        time.sleep(3)
        found = watch.explain()
        world.barrier()
    else:
        found = ("", False)

        def look() -> None:
            nonlocal found
            time.sleep(1.2)  # the barrier has been entered
            found = watch.explain()

        thread = threading.Thread(target=look)
        thread.start()
        world.barrier()
        thread.join()
    watch.close()
    world.barrier()
    return found


def test_layout_lines() -> None:
    lines = launcher.layout_lines(["n1 cuda:0 cpus 0-3", "n1 cuda:1 cpus 4-7", "n2 cpu cpus 0"])
    assert lines == ["n1: rank 0 cuda:0 cpus 0-3, rank 1 cuda:1 cpus 4-7", "n2: rank 2 cpu cpus 0"]
    assert launcher.ranges({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
    assert launcher.ranges(()) == ""
