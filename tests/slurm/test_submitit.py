"""`python -m ddp_ssl.submit` on a real Slurm of two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.launched import until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, Interrupted, rows, status, tiny

pytestmark = pytest.mark.slurm

CONFIG = str(ROOT / "configs/imagenet100/adadim.yaml")


def submit(slurm: Cluster, place: Path, *arguments: str, **env: str) -> dict[str, list[str]]:
    """Submit as a user would; what was printed, by the word at the head of the line."""
    command = [sys.executable, "-m", "ddp_ssl.submit", CONFIG, *arguments]
    environment = slurm.env | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        printed.setdefault(line[:12].strip(), []).append(line[12:])
    return printed


def output(place: Path) -> str:
    """What the ranks wrote."""
    return "\n".join(p.read_text(errors="replace") for p in place.rglob("*_log.*"))


@pytest.mark.long
def test_a_stop_requeues_and_nothing_is_lost(
    slurm: Cluster,
    tmp_path: Path,
    images: Path,
    whole: tuple[Path, str],
) -> None:
    """Two nodes; the signal that submitit sends too; and the deadline is known to the trainer."""
    held = Interrupted(tmp_path)
    cluster = ("--nodes", "2", "--gpus-per-node", "1", "--partition", "main", "--time", "2:00:00")
    printed = submit(slurm, tmp_path, *cluster, *tiny(images), **held.environment)
    (job,), (run,) = printed["job"], printed["run folder"]
    folder = Path(run)
    assert folder == tmp_path / f"runs/imagenet100-adadim-{job}"
    assert f"--run-dir {folder}" in printed["resume"][0]
    assert f"tail -f {folder}/train.log" in printed["watch"][0]
    held.wait(folder)
    slurm.run("scancel", "--signal=USR2", job)
    held.release()
    until(lambda: int(slurm.job(job)["Restarts"]) == 1)
    assert slurm.wait(job) == "COMPLETED", output(tmp_path)
    assert rows(folder) == rows(whole[0])
    assert "Requeued job" in output(tmp_path)
    log = (folder / "train.log").read_text()
    assert log.count("stopped on") == 1
    assert log.count("resumed from") == 1


def test_a_cancelled_job_is_not_requeued(slurm: Cluster, tmp_path: Path, images: Path) -> None:
    held = Interrupted(tmp_path)
    printed = submit(slurm, tmp_path, "--gpus-per-node", "1", *tiny(images), **held.environment)
    (job,), (run,) = printed["job"], printed["run folder"]
    held.wait(Path(run))
    slurm.run("scancel", job)
    held.release()
    assert slurm.wait(job) == "CANCELLED", output(tmp_path)
    assert slurm.job(job)["Restarts"] == "0"
    assert status(Path(run))["state"] == "preempted"
    assert "the job was cancelled, so it is not requeued" in output(tmp_path)


@pytest.mark.long
def test_a_sweep_is_an_array(slurm: Cluster, tmp_path: Path, images: Path) -> None:
    arguments = tiny(images, "optim.epochs=1", "optim.lr=0.1,0.2")
    arguments = [a for a in arguments if a not in ("optim.epochs=3", "optim.lr=0.5")]
    printed = submit(slurm, tmp_path, "--tasks-per-node", "1", *arguments)
    first, second = (line.partition(" ")[0] for line in printed["job"])
    array = first.partition("_")[0]
    assert printed["job"] == [f"{array}_0  lr=0.1", f"{array}_1  lr=0.2"]
    base = tmp_path / f"runs/imagenet100-adadim-{array}"
    assert printed["sweep"] == [f"2 runs in {base}"]
    assert printed["watch"][0].startswith(f"ddp-ssl runs {base}; tail -f {base}/lr=0.1/train.log")
    losses = []
    for job, rate in ((first, "0.1"), (second, "0.2")):
        assert slurm.wait(job) == "COMPLETED", output(tmp_path)
        assert status(base / f"lr={rate}")["state"] == "done"
        table = rows(base / f"lr={rate}")
        losses.append([row["train/loss"] for row in table if "train/loss" in row])
    assert len(losses[0]) == 25
    assert losses[0] != losses[1]
    # Nobody waited for it: the runs themselves wrote the table.
    assert cells((base / "table.md").read_text()) == [
        [f"{base}/lr={rate}", "done", "25"] for rate in ("0.1", "0.2")
    ]


def cells(text: str) -> list[list[str]]:
    """Run, state and step in the table of a sweep."""
    lines = [line for line in text.splitlines() if line.startswith("| /")]
    return [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]


@pytest.mark.long
def test_a_sweep_of_four_on_two_nodes_ends_in_its_table(
    slurm: Cluster, tmp_path: Path, images: Path
) -> None:
    """Each run has a process on each node, two runs go on at a time, and `--wait` shows them."""
    arguments = tiny(images, "optim.epochs=1", "optim.lr=0.1,0.2", "run.seed=1,2")
    arguments = [a for a in arguments if a not in ("optim.epochs=3", "optim.lr=0.5")]
    command = [sys.executable, "-m", "ddp_ssl.submit", CONFIG, "--nodes", "2", "--tasks-per-node",
               "1", "--parallel", "2", "--wait", *arguments]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=slurm.env | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=390,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + output(tmp_path)
    (base,) = (tmp_path / "runs").glob("imagenet100-adadim-*")
    names = [f"lr={rate},seed={seed}" for rate in ("0.1", "0.2") for seed in (1, 2)]
    assert cells(done.stdout) == [[f"{base}/{name}", "done", "25"] for name in names]
    assert done.stdout.endswith((base / "table.md").read_text())
    for name in names:
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
        assert lines[0].split()[1] == "training"
        assert lines[-1].split()[1:6] == ["done", "epoch", "1/1", "step", "25"], lines
        environment = json.loads((base / name / "environment.json").read_text())
        assert environment["world_size"] == 2


def test_what_sbatch_refuses_is_said(slurm: Cluster, tmp_path: Path, images: Path) -> None:
    command = [sys.executable, "-m", "ddp_ssl.submit", CONFIG, *tiny(images)]
    done = subprocess.run(
        [*command, "--partition", "nowhere"], cwd=tmp_path, capture_output=True, text=True,
        env=slurm.env | {"PYTHONPATH": str(ROOT)}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]  # before it, sbatch's own
    assert last.startswith("ddp_ssl: error: nothing was submitted: ")
    assert "invalid partition specified: nowhere" in last
    assert "Traceback" not in done.stderr
