"""The batch scripts on a real Slurm of two nodes: to the end, and stopped in every way."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddp_ssl.run.configure import load
from tests.faults.launched import until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import (
    HELD_AT,
    ONE_EACH,
    ROOT,
    SCRIPT,
    TWO_EACH,
    Interrupted,
    output,
    rows,
    status,
    submit,
    tiny,
)

pytestmark = pytest.mark.slurm

on_cgroup = pytest.mark.parametrize("slurm", ["cgroup"], indirect=True)
on_both = pytest.mark.parametrize("slurm", ["linuxproc", "cgroup"], indirect=True)


def test_the_script_runs_to_the_end_on_two_nodes(whole: tuple[Path, str]) -> None:
    folder, text = whole
    assert status(folder)["state"] == "done"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert [r["step"] for r in rows(folder) if "train/loss" in r] == list(range(1, 76))
    assert "300 images in 100 classes" in text  # and not the class that is none of the hundred
    lines = text.splitlines()
    assert f"run folder  {folder}" in lines
    assert [line.split()[0] for line in lines[2:5]] == ["watch", "stop", "resume"]
    assert f"tail -f {folder}/train.log" in lines[2]
    assert f"touch {folder}/STOP" in lines[3]
    assert f"RUN_DIR={folder} sbatch" in lines[4]


def test_torchrun_runs_to_the_end_on_two_nodes(whole4: tuple[Path, str]) -> None:
    folder, text = whole4
    assert status(folder)["state"] == "done"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 4
    assert "on 2 node(s) of 2 process(es), 1 CPU(s) each, by torchrun" in text
    assert [r["step"] for r in rows(folder) if "train/loss" in r] == list(range(1, 76))


def interrupt_and_compare(
    slurm: Cluster,
    place: Path,
    images: Path,
    expected: Path,
    how: Callable[[str, Path], None],
    *options: str,
    **env: str,
) -> str:
    """Hold a run, do `how`, let it go; it must end as if nothing had happened."""
    held = Interrupted(place)
    job, folder = submit(slurm, place, images, *options, **held.environment, **env)
    held.wait(folder)
    how(job, folder)
    held.release()
    assert slurm.wait(job) == "COMPLETED", output(place)
    assert slurm.job(job)["Restarts"] == "1", output(place)
    log = (folder / "train.log").read_text()
    stops = [line for line in log.splitlines() if "stopped on" in line]
    assert len(stops) == 1, log
    # Two more at most: the flag is read a step late, the STOP file once a second.
    step = int(stops[0].partition("at step ")[2].partition(";")[0])
    assert HELD_AT < step < 75
    assert f"{step}" in log.partition("resumed from")[2].splitlines()[0]  # no step is lost
    assert rows(folder) == rows(expected)
    return output(place)


@on_cgroup
def test_the_doctor_under_srun(slurm: Cluster, images: Path, tmp_path: Path) -> None:
    """Two nodes, one task each: all ranks answer, and what Slurm is like is judged."""
    text = slurm.run(
        "srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "ddp_ssl.doctor",
        "data.name=folder", f"data.root={images}/train", "data.batch_size=12", "run.device=cpu",
        f"run.dir={tmp_path / 'run'}", MASTER_ADDR="127.0.0.1", MASTER_PORT="29871",
    )  # fmt: skip
    lines = {line.split()[1]: line for line in text.splitlines() if line[:4] in ("ok  ", "warn")}
    assert "2 process(es)" in text
    assert "all 2 answer" in lines["processes"]
    assert "sums right" in lines["all-reduce"]
    assert "proctrack/cgroup" in text
    assert text.splitlines()[-1].endswith("0 fail")


def by_signal(slurm: Cluster, job: str) -> None:
    slurm.run("scancel", "--signal=USR2", job)
    time.sleep(1)


def by_requeue(slurm: Cluster, job: str, place: Path) -> None:
    slurm.run("scontrol", "requeue", job)
    until(lambda: "asking the run to save" in output(place))


@on_cgroup
def test_scancel_signal(
    slurm: Cluster, tmp_path: Path, images: Path, whole: tuple[Path, str]
) -> None:
    def how(job: str, folder: Path) -> None:
        by_signal(slurm, job)

    text = interrupt_and_compare(slurm, tmp_path, images, whole[0], how)
    assert "requeued" in text


@pytest.mark.long
@on_both
def test_scancel_signal_under_torchrun(
    slurm: Cluster, tmp_path: Path, images: Path, whole: tuple[Path, str]
) -> None:
    """The ranks never see the signal where Slurm signals direct children only."""

    def how(job: str, folder: Path) -> None:
        by_signal(slurm, job)

    interrupt_and_compare(slurm, tmp_path, images, whole[0], how, LAUNCHER="torchrun")


@on_cgroup
def test_requeue_by_scontrol(
    slurm: Cluster, tmp_path: Path, images: Path, whole4: tuple[Path, str]
) -> None:
    """Four processes; and the launchers give the same numbers."""

    def how(job: str, folder: Path) -> None:
        by_requeue(slurm, job, tmp_path)

    text = interrupt_and_compare(slurm, tmp_path, images, whole4[0], how, *TWO_EACH)
    assert "Slurm has requeued the job by itself" in text


@pytest.mark.long
def test_requeue_by_scontrol_under_torchrun(
    slurm: Cluster, tmp_path: Path, images: Path, whole: tuple[Path, str]
) -> None:
    def how(job: str, folder: Path) -> None:
        by_requeue(slurm, job, tmp_path)

    interrupt_and_compare(slurm, tmp_path, images, whole[0], how, LAUNCHER="torchrun")


@on_cgroup
def test_the_time_limit(
    slurm: Cluster, tmp_path: Path, images: Path, whole: tuple[Path, str]
) -> None:
    """Slurm signals the batch shell some minutes before; the script asks by file."""

    def how(job: str, folder: Path) -> None:
        assert slurm.job(job)["JobState"] == "RUNNING"
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=5")
        until(lambda: "USR2: asking the run to save" in output(tmp_path))
        until((folder / "STOP").exists)
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")

    text = interrupt_and_compare(slurm, tmp_path, images, whole[0], how)
    assert "requeued" in text


@pytest.mark.long
def test_preemption(slurm: Cluster, tmp_path: Path, images: Path, whole: tuple[Path, str]) -> None:
    """A job of a partition with a higher priority wants the nodes."""
    other = ""

    def how(job: str, folder: Path) -> None:
        nonlocal other
        other = slurm.sbatch(
            "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
            "--wrap=sleep 1", cwd=tmp_path,
        )  # fmt: skip
        until(lambda: "asking the run to save" in output(tmp_path))

    interrupt_and_compare(slurm, tmp_path, images, whole[0], how)
    assert slurm.wait(other) == "COMPLETED"


@pytest.mark.long
@on_cgroup
def test_a_stop_file_and_scancel_end_the_job_for_good(
    slurm: Cluster, tmp_path: Path, images: Path, whole: tuple[Path, str]
) -> None:
    """Both leave a checkpoint; the same command goes on from there in the same folder."""
    held = Interrupted(tmp_path)
    job, folder = submit(slurm, tmp_path, images, **held.environment)
    held.wait(folder)
    (folder / "STOP").touch()
    time.sleep(1.2)
    held.release()
    assert slurm.wait(job) == "COMPLETED", output(tmp_path)
    assert slurm.job(job)["Restarts"] == "0"
    assert "stopped by the STOP file" in output(tmp_path)
    first = status(folder)
    assert first["state"] == "preempted"

    again = Interrupted(tmp_path / "again")
    again.gate.parent.mkdir()
    again.environment["HOLD_AT"] = "30"
    job, _ = submit(slurm, tmp_path, images, **again.environment, RUN_DIR=str(folder))
    until(lambda: any(row["step"] == 30 for row in rows(folder)), 180)
    slurm.run("scancel", job)
    until(lambda: "TERM: asking the run to save" in output(tmp_path))
    again.release()
    assert slurm.wait(job) == "CANCELLED", output(tmp_path)
    assert slurm.job(job)["Restarts"] == "0"
    assert "the job was cancelled, so it is not requeued" in output(tmp_path)
    second = status(folder)
    assert second["state"] == "preempted"
    assert first["step"] < second["step"] < 75

    job, _ = submit(slurm, tmp_path, images, RUN_DIR=str(folder))
    assert slurm.wait(job) == "COMPLETED", output(tmp_path)
    assert rows(folder) == rows(whole[0])


@pytest.mark.long
def test_a_crash_that_repeats_is_given_up(slurm: Cluster, tmp_path: Path, images: Path) -> None:
    """Rank 1 is killed at the same step again and again: three times, and not for ever."""
    job, folder = submit(slurm, tmp_path, images, DIE_AT="14")
    assert slurm.wait(job) == "FAILED", output(tmp_path)
    assert slurm.job(job)["Restarts"] == "2"
    text = output(tmp_path)
    assert "crashed three times in a row after step 10: given up" in text
    assert len((folder / "crashes.txt").read_text().splitlines()) == 3


def test_a_crash_is_recovered_from(
    slurm: Cluster, tmp_path: Path, images: Path, whole: tuple[Path, str]
) -> None:
    """And MAX_REQUEUES bounds how often."""
    job, folder = submit(slurm, tmp_path, images, DIE_AT="14", MAX_REQUEUES="0")
    assert slurm.wait(job) == "FAILED", output(tmp_path)
    assert "not requeued: started again 0 times (MAX_REQUEUES=0)" in output(tmp_path)
    job, _ = submit(slurm, tmp_path, images, RUN_DIR=str(folder))
    assert slurm.wait(job) == "COMPLETED", output(tmp_path)
    assert rows(folder) == rows(whole[0])


def test_a_mistake_is_said_in_one_line_and_not_repeated(
    slurm: Cluster, tmp_path: Path, images: Path
) -> None:
    job, folder = submit(slurm, tmp_path, images, more=("optim.lrr=1",))
    other, _ = submit(slurm, tmp_path, images, LAUNCHER="mpirun")
    assert slurm.wait(job) == slurm.wait(other) == "FAILED"
    assert slurm.job(job)["Restarts"] == slurm.job(other)["Restarts"] == "0"
    assert not folder.exists()
    errors = [line for line in output(tmp_path).splitlines() if line.startswith("ddp_ssl: error")]
    assert errors == [next(e for e in errors if "optim.lrr: unknown key" in e)]
    assert "LAUNCHER=mpirun is unknown; srun or torchrun would be accepted" in output(tmp_path)


@pytest.mark.long
def test_the_ablation_is_an_array(slurm: Cluster, tmp_path: Path, images: Path) -> None:
    """Two rows side by side, each in a folder of its name; a task beyond the last row ends."""
    configs = sorted((ROOT / "configs/imagenet100/ablation").glob("*.yaml"))
    if len(configs) < 2:
        pytest.skip("configs/imagenet100/ablation has no two rows")
    arguments = [
        a for a in tiny(images, "optim.epochs=1", "eval.every=0", "measure.every=0")
        if not a.startswith(("method.", "optim.epochs=3", "eval.every=2", "measure.every=1"))
    ]  # fmt: skip
    script = str(ROOT / "slurm/ablation_array.sh")
    array = f"--array=0,1,{len(configs)}"
    job = slurm.sbatch("--nodes=1", "--gpus-per-node=1", array, script, *arguments, cwd=tmp_path)
    for task in ("0", "1", str(len(configs))):
        assert slurm.wait(f"{job}_{task}") == "COMPLETED", output(tmp_path)
    for config in configs[:2]:
        assert status(tmp_path / f"runs/ablation-{job}/{config.stem}")["state"] == "done"
    assert f"no row {len(configs)}; there are {len(configs)}" in output(tmp_path)


@pytest.mark.long
def test_a_yaml_of_one_s_own(slurm: Cluster, tmp_path: Path, images: Path) -> None:
    """Two nodes; the file lies where it is submitted from, and its name is the folder's."""
    project = str(ROOT / "configs/imagenet100/adadim.yaml")
    (tmp_path / "own.yaml").write_text(load([project, *tiny(images)]).to_yaml())
    script = str(ROOT / "slurm/train.sh")
    job = slurm.sbatch(*ONE_EACH, script, "own.yaml", "optim.epochs=2", cwd=tmp_path)
    assert slurm.wait(job) == "COMPLETED", output(tmp_path)
    folder = tmp_path / f"runs/own-{job}"
    assert status(folder)["state"] == "done"
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    assert [r["step"] for r in rows(folder) if "train/loss" in r] == list(range(1, 51))
    assert f"RUN_DIR={folder} sbatch ... slurm/train.sh" in output(tmp_path)


@pytest.mark.long
def test_the_scripts_find_their_repository(slurm: Cluster, tmp_path: Path) -> None:
    """Where that cannot be known, of a copy elsewhere, they say what to do."""
    text = Path(SCRIPT).read_text()
    (tmp_path / "copy.sh").write_text(text)
    job = slurm.sbatch("copy.sh", cwd=tmp_path)
    assert slurm.wait(job) == "FAILED"
    lines = output(tmp_path).splitlines()
    assert len(lines) == 1
    assert "finds no slurm/run.sh; submit it from the repository" in lines[0]
