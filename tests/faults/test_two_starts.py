"""The same run started twice: one trains, and no row, checkpoint or step is lost or doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from ddp_ssl.checkpoint import store
from tests.faults.launched import TRAIN, Launched, arguments_of, last_step, torchrun, until
from tests.runs import BARE, arguments, rows, status

pytestmark = pytest.mark.faults

STEPS = 24


def short(photos: Path, folder: Path, **changes: object) -> list[str]:
    """8 epochs of 3 steps."""
    few = {"optim__epochs": STEPS // 3, "checkpoint__every_steps": 5}
    return arguments_of(arguments(photos, folder, *BARE), **{**few, **changes})


def start(words: list[str], output: Path, **environment: str) -> Launched:
    return Launched([sys.executable, *TRAIN, *words], output, **environment)


def assert_once(folder: Path) -> None:
    """Every step has one row, every checkpoint a step of its own, and no claim is left."""
    assert status(folder)["state"] == "done"
    assert [r["step"] for r in rows(folder) if "train/loss" in r] == list(range(1, STEPS + 1))
    steps = [found.step for found in store.find(folder)]
    assert len(steps) == len(set(steps))
    assert not list(folder.glob("claim-*"))


@pytest.mark.long
@pytest.mark.parametrize("trial", range(4))
def test_the_same_command_twice(photos: Path, tmp_path: Path, trial: int) -> None:
    """With `run.resume=auto` the second waits for the first, or is refused; never both."""
    folder, draw = tmp_path / "run", random.Random(trial)
    words = short(photos, folder, run__resume="auto", run__timeout_s=draw.choice([1, 60]))
    runs = [start(words, tmp_path / "0")]
    try:
        time.sleep(draw.choice([0, draw.uniform(0, 20)]))
        runs.append(start(words, tmp_path / "1"))
        codes = [run.wait() for run in runs]
    finally:
        for run in runs:
            run.process.kill()
    texts = [run.text() for run in runs]
    assert 0 in codes, texts
    for code, text in zip(codes, texts, strict=True):
        assert code == 0 or (code == 2 and "is in use by process" in text), text
        assert "Traceback" not in text
    assert_once(folder)


def test_two_seeds_into_one_new_folder(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs = [start(short(photos, folder, run__seed=s), tmp_path / str(s)) for s in (1, 2)]
    try:
        codes = [run.wait() for run in runs]
    finally:
        for run in runs:
            run.process.kill()
    assert sorted(codes) == [0, 2], [run.text() for run in runs]
    refused = runs[codes.index(2)].text()
    assert "is in use by process" in refused or "is not empty" in refused
    assert_once(folder)
    assert f"  seed: {1 + codes.index(0)} " in (folder / "config.yaml").read_text()


@pytest.mark.long
def test_starts_of_one_second_without_a_folder(photos: Path, tmp_path: Path) -> None:
    words = [w for w in short(photos, tmp_path) if not w.startswith("run.dir=")]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    # In one Slurm job the names are the same, whenever they start.
    job = {"SLURM_JOB_ID": "9", "PYTHONPATH": path}
    (tmp_path / "place").mkdir()
    runs = []
    try:
        for seed in (1, 2):
            run = ["-c", f"import os, sys; os.chdir('{tmp_path}/place');"
                   "from ddp_ssl.train import main; sys.exit(main(sys.argv[1:]))"]  # fmt: skip
            command = [sys.executable, *run, *words, f"run.seed={seed}"]
            runs.append(Launched(command, tmp_path / f"{seed}.out", **job))
        assert [run.wait() for run in runs] == [0, 0], [run.text() for run in runs]
    finally:
        for run in runs:
            run.process.kill()
    folders = sorted((tmp_path / "place/runs").iterdir())
    assert len(folders) == 2
    seeds = set()
    for folder in folders:
        assert_once(folder)
        seeds |= {x for x in (folder / "config.yaml").read_text().split("\n") if " seed:" in x}
    assert len(seeds) == 2


def test_a_requeue_takes_over_from_a_killed_run_at_once(photos: Path, tmp_path: Path) -> None:
    """On another machine too: the claim is made to look like one that is still heard of."""
    folder = tmp_path / "run"
    words = short(photos, folder, run__resume="auto")
    first = start(words, tmp_path / "0", SLURM_JOB_ID="5")
    until(lambda: last_step(folder) >= 6 and first.process.poll() is None)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    (claim,) = folder.glob("claim-*.json")
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"machine": "another"}))
    later = start(words, tmp_path / "1", SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
    assert later.wait() == 0, later.text()
    assert "waiting" not in later.text()
    assert_once(folder)


def test_a_torchrun_beside_another_is_refused_on_all_ranks(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = short(photos, folder, optim__epochs=2000)
    with torchrun(2, words, tmp_path / "0") as run:
        until(lambda: last_step(folder) >= 5 and run.going())
        with torchrun(2, words, tmp_path / "1", "--max-restarts", "0") as other:
            assert other.wait() != 0
            assert "is in use by process" in other.text()
        run.process.send_signal(signal.SIGTERM)
        run.wait()
    assert status(folder)["state"] == "preempted"
    assert not list(folder.glob("claim-*"))
