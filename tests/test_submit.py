"""Submitting through submitit: sweeps, folders, messages, and runs on this machine.

tests/slurm submits to a real Slurm.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_ssl import submit
from ddp_ssl.commands import submit_options
from tests.runs import BARE, arguments

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
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-0", 2880), ("1-2:3", 1563), ("0-0:0:1", 1)],
)
def test_times_are_sbatch_s(text: str, minutes: int) -> None:
    assert submit_options._minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "0", "-5", "1-"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        submit_options._minutes(text)


def test_what_is_pickled_belongs_to_the_package() -> None:
    training = submit.Training(["run.seed=1"], "/runs/x-%A", 3)
    again = pickle.loads(pickle.dumps(training.checkpoint().function))
    assert type(again) is submit.Training
    assert vars(again) == vars(training)
    assert again.folder_of("77_3") == "/runs/x-77"


def test_mistakes_are_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for words, text in {
        ("optim.lrr=1",): "optim.lrr: unknown key; did you mean optim.lr?",
        ("optim.lr=0.1,fast",): "optim.lr: ",
        ("run.dir=here",): "run.dir: --run-dir names the folder",
        ("--nodes", "3", "data.batch_size=16"): "data.batch_size: 16 images cannot be split",
        (): "--cluster slurm: there is no sbatch on this machine",
        ("--cluster", "local", "--nodes", "2"): "--nodes: local is this machine alone",
        ("--cluster", "debug", "--tasks-per-node", "2"): "--cluster debug: one process",
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


@pytest.mark.long
@pytest.mark.faults
def test_a_sweep_goes_on_after_a_run_that_fails(photos: Path, tmp_path: Path) -> None:
    """One run after the other; the first one finds no images."""
    given = words(photos, "optim.epochs=1", f"data.root=nowhere,{photos}")
    given = [a for a in given if a not in ("optim.epochs=3", f"data.root={photos}")]
    done = run(tmp_path, *LOCAL, *given)
    assert done.returncode == 1, done.stdout + done.stderr
    bad, good = (line[12:] for line in done.stdout.splitlines() if line.startswith("run folder"))
    assert Path(good).parent == tmp_path / "out"
    assert bad == f"{tmp_path}/out/root=nowhere"
    assert json.loads((Path(good) / "status.json").read_text())["state"] == "done"
    assert f"done: {good}\n" in done.stdout
    assert f"not started: {bad}\n" in done.stdout
    assert [row[:3] for row in table(done.stdout)] == [
        [bad, "not started", "0"], [good, "done", "3"]
    ]  # fmt: skip
    assert "nowhere does not exist" in done.stderr


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
    for seed in (1, 2):
        status = json.loads((folder / f"seed={seed}" / "status.json").read_text())
        assert status["state"] == "done"
