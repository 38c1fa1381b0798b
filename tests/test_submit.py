"""Submitting through submitit: sweeps, folders, messages, and runs on this machine.

tests/slurm submits to a real Slurm.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddp_ssl import submit
from ddp_ssl.commands import live, submit_options
from ddp_ssl.run.configure import load
from ddp_ssl.run.overview import Overview
from tests.faults.launched import until
from tests.runs import BARE, arguments, train

ROOT = Path(__file__).parent.parent


def run(place: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m ddp_ssl.submit`, from an empty folder and without Slurm."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTHONPATH"))}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, "-m", "ddp_ssl.submit", *words],
        cwd=place, env=clean, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def test_a_sweep_is_the_product_of_its_lists() -> None:
    swept = submit.sweep(["c.yaml", "optim.lr=0.1,0.2", "model.projector=[8, 4]", "a.b=x,y,z"])
    assert len(swept) == 6
    assert swept[0] == ["c.yaml", "optim.lr=0.1", "model.projector=[8, 4]", "a.b=x"]
    assert swept[-1] == ["c.yaml", "optim.lr=0.2", "model.projector=[8, 4]", "a.b=z"]
    assert submit.sweep(["data.root='a,b'", "data.views=[{count: 2, size: 9}]", "run.seed=1"]) == [
        ["data.root=a,b", "data.views=[{count: 2, size: 9}]", "run.seed=1"]
    ]
    assert submit.sweep([]) == [[]]


def test_a_config_in_the_folder_of_a_sweep_is_one_config(tmp_path: Path) -> None:
    config = tmp_path / "lr=0.1,seed=1.yaml"
    config.touch()
    assert submit.sweep([str(config), "run.seed=1,2"]) == [
        [str(config), "run.seed=1"], [str(config), "run.seed=2"]
    ]  # fmt: skip


def test_runs_of_a_sweep_have_readable_folders_of_their_own() -> None:
    words = ["configs/imagenet100/adadim.yaml", "optim.lr=0.1,0.2", "model.projector=[8],[9, 9]"]
    runs = submit.sweep(words)
    options = argparse.Namespace(run_dir=None)
    name = submit.run_name(words)
    assert name == "imagenet100-adadim"
    assert submit.run_name(["data.root=/images", words[0]]) == name
    assert submit.run_name(["optim.lr=1", "data.root=/images/my cats"]) == "my_cats"
    assert submit.run_name(["optim.lr=1"]) == "digits"
    got = [Path(f) for f in submit.folders(runs, name, options)]
    assert {f.parent for f in got} == {Path.cwd() / "runs/imagenet100-adadim-%A"}
    assert [f.name for f in got] == [
        "lr=0.1,projector=_8_", "lr=0.1,projector=_9,_9_",
        "lr=0.2,projector=_8_", "lr=0.2,projector=_9,_9_",
    ]  # fmt: skip
    alike = submit.folders([["run.dir=a/b"], ["run.dir=a?b"]], "n", options)
    assert len(set(alike)) == 2
    options.run_dir = "here"
    assert submit.folders([["a=1"]], "n", options) == [str(Path.cwd() / "here")]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("24:00:00", 1440),
        ("2-0", 2880),
        ("1-2:3", 1563),
        ("0-0:0:1", 1),
        ("1-02:03:04", 1564),
    ],
)
def test_times_are_sbatch_s(text: str, minutes: int) -> None:
    assert submit_options._minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "0", "-5", "1-"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        submit_options._minutes(text)


def test_what_is_pickled_belongs_to_the_package() -> None:
    training = submit.Training(["run.seed=1"], "/runs/x-%A", 3, ["/runs/x-%A"])
    again = pickle.loads(pickle.dumps(training.checkpoint().function))
    assert type(again) is submit.Training
    assert vars(again) == vars(training)
    assert again.folder_of("77_3") == "/runs/x-77"


def test_mistakes_are_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for words, text in {
        ("optim.lrr=1",): "optim.lrr: unknown key; did you mean optim.lr?",
        ("optim.lr=0.1,fast",): "optim.lr: ",
        ("run.dir=here",): "run.dir: --run-dir names the folder",
        ("--nodes", "3", "data.batch_size=16"): "data.batch_size: 16 images cannot be split",
        (): "--cluster slurm: there is no sbatch on this machine",
        ("--cluster", "local", "--nodes", "2"): "--nodes: local is this machine alone",
        ("--cluster", "debug", "--tasks-per-node", "2"): "--cluster debug: one process",
        ("--cluster", "debug", "--parallel", "2"): "--parallel: debug has one process",
        (
            "--cluster",
            "local",
            "--gpus-per-node",
            "1",
            "--parallel",
            "2",
            "run.seed=1,2",
        ): "--gpus-per-node: 1 for 2 runs at a time, and there are 1; fewer",
        ("--cluster", "slrum"): "argument --cluster: invalid choice: 'slrum' (choose from ",
        ("--time", "soon"): "'soon' is not a time such as 24:00:00",
        ("--nods", "2"): "unrecognized arguments: --nods",
    }.items():
        assert submit.main(list(words)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("ddp_ssl: error: ")
        assert captured.err.count("\n") == 1
        assert text in captured.err


def words(photos: Path, *more: str) -> list[str]:
    """A tiny run; submit names the folder itself."""
    given = arguments(photos, Path("unused"), *more)
    return [a for a in given if not a.startswith("run.dir=")]


LOCAL = ("--cluster", "local", "--tasks-per-node", "2", "--run-dir", "out")


def test_local_runs_several_processes(photos: Path, tmp_path: Path) -> None:
    done = run(tmp_path, *LOCAL, *words(photos, *BARE, "optim.epochs=1"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"done: {tmp_path}/out\n" in done.stdout
    assert json.loads((tmp_path / "out/status.json").read_text())["state"] == "done"
    assert json.loads((tmp_path / "out/environment.json").read_text())["world_size"] == 2
    # Linux gives the ports from 32768 on to outgoing connections, so one of them may be taken.
    log = (tmp_path / "out/train.log").read_text()
    assert 10_000 <= int(log.partition("rendezvous 127.0.0.1:")[2].partition(";")[0]) < 30_000
    assert f"touch {tmp_path}/out/STOP" in done.stdout


def test_a_run_that_is_refused_is_no_success(photos: Path, tmp_path: Path) -> None:
    """The folder still tells how an earlier start ended."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/status.json").write_text('{"state": "preempted", "step": 3, "epoch": 1}')
    given = [a for a in words(photos, *BARE) if a != f"data.root={photos}"]
    done = run(tmp_path, "--cluster", "local", "--run-dir", "out", *given, "data.root=nowhere")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nowhere does not exist" in done.stderr


def test_a_sweep_on_this_machine(photos: Path, tmp_path: Path) -> None:
    """Two runs at a time, each on a core of its own; the first one finds no images."""
    (tmp_path / "same").symlink_to(photos)
    (tmp_path / "again").symlink_to(photos)
    given = words(photos, *BARE, "optim.epochs=1", "data.root=nowhere,same,again")
    given = [a for a in given if a not in ("optim.epochs=3", f"data.root={photos}")]
    done = run(tmp_path, "--cluster", "local", "--parallel", "2", "--run-dir", "out", *given)
    assert done.returncode == 1, done.stdout + done.stderr
    base, names = tmp_path / "out", ["root=nowhere", "root=same", "root=again"]
    assert f"sweep       3 runs in {base}\n" in done.stdout
    assert f"touch {base}/root=nowhere/STOP (that run" in done.stdout
    printed = done.stdout.splitlines()
    lines = [[p.split()[1:] for p in printed if p.startswith(f"{name} ")] for name in names]
    assert lines[0] == [["not", "started"]]
    assert "nowhere does not exist" in done.stderr
    for name, shown in zip(names[1:], lines[1:], strict=True):
        assert shown[-1][:5] == ["done", "epoch", "1/1", "step", "3"]
        assert json.loads((base / name / "status.json").read_text())["state"] == "done"
    ends = [["not started", "0"], ["done", "3"], ["done", "3"]]
    assert [row[:3] for row in table(done.stdout)] == [
        [f"{base}/{name}", *end] for name, end in zip(names, ends, strict=True)
    ]
    assert done.stdout.endswith((base / "table.md").read_text())
    if len(os.sched_getaffinity(0)) > 1:
        logs = [(base / name / "train.log").read_text() for name in names[1:]]
        assert len({re.findall(r"rank 0 cpu cpus (\S+)", log)[0] for log in logs}) == 2


def test_runs_at_the_same_time_share_out_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5,6,7,8")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 8, 9})
    assert submit._shares(2, 2) == ([["3", "GPU-5"], ["6", "7"]], [[4, 5], [6, 8]])
    assert submit._shares(0, 3)[0] == [[], [], []]
    assert submit._shares(0, 7)[1] == [[4], [5], [6], [8], [9], [4], [5]]


@pytest.mark.faults
def test_ctrl_c_is_for_the_whole_sweep(photos: Path, tmp_path: Path) -> None:
    """The run under way saves and ends; the other one is not started; the same command goes on."""
    given = words(photos, *BARE, "run.seed=1,2", "optim.epochs=3000")
    command = [sys.executable, "-m", "ddp_ssl.submit", "--cluster", "local", "--run-dir", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *(a for a in given if a != "optim.epochs=3")], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: (tmp_path / "out/seed=1/metrics.jsonl").exists())
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert [row[1] for row in table(out)] == ["stopped", "not started"]
    assert list((tmp_path / "out/seed=1/checkpoints").glob("step_*.pt"))
    assert not (tmp_path / "out/seed=2").exists()


def table(printed: str) -> list[list[str]]:
    """The cells of the table at the end of a sweep, without its heading."""
    lines = [line for line in printed.splitlines() if line.startswith("| /")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_debug_runs_a_sweep_in_this_process(photos: Path, tmp_path: Path) -> None:
    given = words(photos, *BARE, "optim.epochs=1", "run.seed=1,2")
    done = run(tmp_path, "--cluster", "debug", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").glob("digits-*")
    assert [row[:4] for row in table(done.stdout)] == [
        [f"{folder}/seed={seed}", "done", "3", "1/1"] for seed in (1, 2)
    ]
    assert done.stdout.endswith((folder / "table.md").read_text())
    lines = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("seed=")]
    # A run of a second may have ended before it was looked at.
    assert [line for line in lines if line[1] != "training"] == [
        ["seed=1", "done"],
        ["seed=2", "done"],
    ]
    assert lines[0][0] == "seed=1"
    for seed in (1, 2):
        status = json.loads((folder / f"seed={seed}" / "status.json").read_text())
        assert status["state"] == "done"


# --- the lines -----------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal; knows the codes that are used."""

    def isatty(self) -> bool:
        return True

    def shows(self) -> list[str]:
        """What stands on it now."""
        lines, at = [""], 0
        for code, up, text in re.findall(r"(\x1b\[(\d*)[AJ]|\r)|([^\x1b\r]+)", self.getvalue()):
            if up:
                at -= int(up)
            elif code.endswith("J"):
                lines[at:] = [""]
            for part in text.splitlines(keepends=True):
                lines[at] += part.rstrip("\n")
                if part.endswith("\n"):
                    at += 1
                    lines[at:] = [*lines[at:]] or [""]
        return lines[:-1] if lines[-1] == "" else lines


class Runs:
    """Overviews of runs that have no folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.folders = [Path(name) for name in names]
        self.now = {f: Overview(f, "not started", False, 0, None, None, None, None, 0.0)
                    for f in self.folders}  # fmt: skip
        monkeypatch.setattr(live, "overviews", lambda folders: [self.now[f] for f in folders])

    def be(self, name: str, **changes: Any) -> None:
        self.now[Path(name)] = dataclasses.replace(self.now[Path(name)], **changes)


def test_lines_are_rewritten_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(live.shutil, "get_terminal_size", lambda: (60, 5))
    runs = Runs(monkeypatch, "lr=0.1", "lr=0.25")
    shown = live.Live(runs.folders)
    shown.update()
    assert screen.shows() == ["lr=0.1   waiting", "lr=0.25  waiting"]
    runs.be("lr=0.1", state="training", epoch=1, epochs=3, step=7)
    shown.update()
    shown.update()
    assert screen.shows() == ["lr=0.1   training     epoch 1/3  step 7", "lr=0.25  waiting"]
    shown.clear()
    assert screen.shows() == []
    runs.be("lr=0.1", state="failed", error="the loss is\nnan " + "x" * 100)
    runs.be("lr=0.25", state="training", epoch=0, metric="eval/knn_top1", best=0.5)
    shown.update([0])
    assert screen.shows() == [
        "lr=0.1   failed       epoch 1/3  step 7  the loss is nan xx",
        "lr=0.25  training     epoch 0/?  step 0  eval/knn_top1 0.50",
    ]
    shown.update([0, 1])  # the cluster has ended it without a word from it
    assert shown.found[1].state == "dead"
    runs.be("lr=0.1", state="done")  # one that has ended is not looked at any more
    shown.update([0, 1])
    assert shown.found[0].state == "failed"


def test_more_runs_than_a_terminal_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those under way are shown, then those that have ended."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(live.shutil, "get_terminal_size", lambda: (60, 5))
    runs = Runs(monkeypatch, "a", "b", "c", "d", "e", "f")
    shown = live.Live(runs.folders)
    for name, state in {"a": "done", "b": "done", "c": "done", "e": "training"}.items():
        runs.be(name, state=state)
    shown.update([0, 1, 2])
    assert screen.shows() == ["a  done", "b  done", "e  training", "and 3 more"]


def test_lines_are_printed_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When a state changes; steps now and then; never twice the same."""
    clock = 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: clock)
    runs = Runs(monkeypatch, "a", "b")
    shown = live.Live(runs.folders)
    shown.update()
    assert capsys.readouterr().out == ""  # what waits is known
    for step in range(1, 26):  # a second each
        clock += 1
        runs.be("a", state="training", epoch=step // 10, epochs=9, step=step)
        shown.update()
    runs.be("a", state="done", collapsed=True)
    shown.update([0])
    shown.update([0, 1])
    shown.update([0, 1])
    assert capsys.readouterr().out.splitlines() == [
        "a  training     epoch 0/9  step 1",
        "a  training     epoch 1/9  step 11",
        "a  training     epoch 2/9  step 21",
        "a  done, collapsed  epoch 2/9  step 25",
        "b  not started",
    ]
    clock += 1
    runs.be("b", state="training")
    assert shown.state(1) == "not started"


def test_a_table_knows_of_runs_that_end_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = Runs(monkeypatch, f"{tmp_path}/a", f"{tmp_path}/b")
    runs.be(f"{tmp_path}/a", state="done")
    runs.be(f"{tmp_path}/b", state="training")
    written = live.replace_text

    def slow(path: Path, text: str) -> None:
        runs.be(f"{tmp_path}/b", state="done")
        written(path, text)

    monkeypatch.setattr(live, "replace_text", slow)
    live.write_table(runs.folders)
    assert [row[1] for row in table((tmp_path / "table.md").read_text())] == ["done", "done"]


def test_jobs_are_watched_until_slurm_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A Slurm that does not answer is asked again; what ended without a word is dead."""
    places = [f"{tmp_path}/a", f"{tmp_path}/b"]
    runs, options = Runs(monkeypatch, *places), argparse.Namespace(alone=False)

    def answers(*given: Any) -> None:
        left = iter(given)

        def asked() -> set[str]:
            answer = next(left)
            if isinstance(answer, BaseException):
                raise answer
            return {*answer}

        monkeypatch.setattr(submit, "queued_jobs", asked)
        monkeypatch.setattr(submit, "ASK_EVERY_S", 0)

    runs.be(places[0], state="training", step=5)
    answers(["7_0", "7_1", "9"], OSError("no answer"), ["7_1"], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=rf"the jobs go on; ddp-ssl runs {tmp_path} shows"):
        submit._watch(["7_0", "7_1"], places, options)
    assert capsys.readouterr().out.splitlines() == ["a  training", "a  dead"]
    runs.be(places[0], state="stopped")  # requeued: it goes on
    runs.be(places[1], state="done")
    answers(["7_0", "7_1"], ["7_0"], [])
    assert submit._watch(["7_0", "7_1"], places, options) == 0
    assert [row[1] for row in table(capsys.readouterr().out)] == ["stopped", "done"]
    runs.be(places[0], state="training")
    answers([])
    assert submit._watch(["7_0", "7_1"], places, options) == 1
    assert [row[1] for row in table((tmp_path / "table.md").read_text())] == ["dead", "done"]


# --- from `ddp-ssl train` ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "command", "runs"),
    [
        (["optim.lr=0.1,0.2"], "optim.lr=0.1,0.2", 2),
        (["cifar/adadim", "data.views.0.size=16,32"], "cifar/adadim data.views.0.size=16,32", 2),
        (["method.temperature=0.1,0.2", "optim.name=sgd,lars"],
         "method.temperature=0.1,0.2 optim.name=sgd,lars", 4),
        (["model.projector=[8],[9, 9]"], "'model.projector=[8],[9, 9]'", 2),
        (["data.skip=a,b", "run.dir=c,d", "run.seed=1,2"],
         "--run-dir=c,d 'data.skip=\"a,b\"' run.seed=1,2", 2),
    ],
)  # fmt: skip
def test_train_points_to_submit(
    given: list[str], command: str, runs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that it points to is accepted and keeps texts whole."""
    assert train(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    line = error.rstrip().partition("; one run for each value: ")[2]
    assert line == f"ddp-ssl submit --cluster local {command}", error
    options = submit_options.parser().parse_intermixed_args(shlex.split(line)[2:])
    loaded = [load(each).config for each in submit.sweep(options.arguments)]
    assert len(loaded) == runs
    if "c,d" in command:
        assert {config.data.skip for config in loaded} == {"a,b"}
        assert options.run_dir == "c,d"


def test_as_many_processes_as_train_was_started_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for more, option in {"run.device=cuda": "gpus", "run.device=cpu": "tasks"}.items():
        assert train(["run.seed=1,2", more]) == 2
        assert f"local --{option}-per-node 2 run.seed=1,2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["data.root=a,b"], ["method.name=simclr,vicreg"], ["model.backbone=a,b"],  # texts
        ["model.projector=8,4"],  # a list without its brackets
        ["optim.lr=0.1,fast"], ["optim.lrr=1,2"], ["optim.lr=0.1,"],  # submit would refuse it
        ["optim.lr=1,2", "run.resume=auto", "run.dir=x"],  # of a run that goes on
    ],
)  # fmt: skip
def test_train_points_nowhere(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "submit" not in error


def test_a_job_of_an_earlier_version_still_runs() -> None:
    """A pickled job in a queue has the attributes of the version that submitted it."""
    old = submit.Training.__new__(submit.Training)
    old.__dict__.update(arguments=[], folder="x", max_requeues=3)
    assert (list(old.swept), old.gpus, old.on_step) == ([], "", None)
