"""`ddp-ssl reproduce --launcher slurm` on a real Slurm: submitted once, queued, collected."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.launched import until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT

pytestmark = pytest.mark.slurm

TINY = (
    "optim.epochs=1", "model.backbone_args={channels: [8, 8, 16, 16]}", "model.projector=[24, 12]",
    "run.threads=1", "data.threads=1", "eval.knn=false", "log.tensorboard=false",
)  # fmt: skip


def reproduce(slurm: Cluster, out: Path, *arguments: str) -> str:
    """What a call prints."""
    command = [
        sys.executable, "tools/reproduce.py", "table6", "--scale", "small", "--only", "alpha 0",
        "--seeds", "2", "--out", str(out), *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=slurm.env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_seeds_are_an_array_submitted_once(slurm: Cluster, tmp_path: Path) -> None:
    launch = ("--launcher", "slurm", "--submit", "--partition main --time 1:00:00", *TINY)
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # jobs wait
    first = reproduce(slurm, tmp_path, *launch)
    queued = slurm.run("squeue", "--noheader", "--array", "--format=%i")
    assert len(queued.split()) == 2, first
    again = reproduce(slurm, tmp_path, *launch)
    assert slurm.run("squeue", "--noheader", "--array", "--format=%i").split() == queued.split()
    assert "queued" in again
    slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
    until(lambda: not slurm.run("squeue", "--noheader").strip(), 420)
    printed = reproduce(slurm, tmp_path, "--collect")
    assert "2 of 2" in printed
    (table,) = (tmp_path / "small").glob("table6-digits.json")
    assert "alpha 0" in json.dumps(json.loads(table.read_text()))
