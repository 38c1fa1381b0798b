"""A Slurm of its own for the tests in this folder, and what they train on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddp_ssl.utils.files import json_file
from tests.runs import SMALL
from tests.slurm.cluster import Cluster, Unavailable, running

ROOT = Path(__file__).parent.parent.parent
HELD_AT = 13
SCRIPT = str(ROOT / "slurm/imagenet100_adadim.sh")
ONE_EACH = ("--nodes=2", "--gpus-per-node=1")
TWO_EACH = ("--nodes=2", "--gpus-per-node=2")


def tiny(images: Path, *more: str) -> list[str]:
    """Overrides that make configs/imagenet100/adadim.yaml 100 steps of a tiny network."""
    return [
        f"data.root={images}",
        *SMALL,
        "optim.warmup_epochs=1",
        "optim.lr=0.5",
        "optim.precision=fp32",
        "method.name=tests.slurm.held:Held",
        "eval.every=2",
        "checkpoint.every_steps=10",
        *more,
    ]


class Interrupted:
    """The environment that holds a run at step HELD_AT until the test lets it go."""

    def __init__(self, place: Path) -> None:
        self.gate = place / "go"
        self.environment = {"HOLD_AT": str(HELD_AT), "HOLD_UNTIL": str(self.gate)}

    def wait(self, folder: Path, seconds: float = 180) -> None:
        """Until the run in this folder is held."""
        deadline = time.monotonic() + seconds
        while not any(row["step"] == HELD_AT - 1 for row in rows(folder)):
            assert time.monotonic() < deadline, output(folder.parent.parent)
            time.sleep(0.2)

    def release(self) -> None:
        """Let the run finish its step."""
        self.gate.touch()


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was logged, but for times."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in parsed]


def status(folder: Path) -> dict[str, Any]:
    """`status.json`, or nothing."""
    return json_file(folder / "status.json")


def output(place: Path) -> str:
    """What the job wrote."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(place.glob("slurm-*.out")))


def submit(
    slurm: Cluster, place: Path, images: Path, *options: str, more: tuple[str, ...] = (), **env: str
) -> tuple[str, Path]:
    """Submit the script as a user would; the job's id and its run folder."""
    options = options or ONE_EACH
    job = slurm.sbatch(*options, SCRIPT, *tiny(images, *more), cwd=place, **env)
    return job, place / f"runs/imagenet100_adadim-{job}"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet as a class folder, three small images each of the hundred classes and one other."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    lines = (ROOT / "ddp_ssl/data/imagenet100_classes.txt").read_text().splitlines()
    names = [line for line in lines if line.startswith("n")]
    assert len(names) == 100
    for label, name in enumerate([*names, "n00000001"]):
        for split, count in (("train", 3), ("val", 1)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.normal(size=(6, 5, 3)) * 60 + 80 + label / 2
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((24, 20))
                image.save(root / split / name / f"{index}.JPEG", quality=90)
    return root


def _session(proctrack: str, factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with running(factory.mktemp(f"slurm-{proctrack}"), proctrack) as started:
            yield started
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def linuxproc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that signals whole process trees."""
    yield from _session("linuxproc", tmp_path_factory)


@pytest.fixture(scope="session")
def cgroup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that signals direct children of slurmstepd only, as production clusters do."""
    yield from _session("cgroup", tmp_path_factory)


@pytest.fixture
def slurm(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster named by the test's parameter (linuxproc without one), empty after the test."""
    cluster: Cluster = request.getfixturevalue(getattr(request, "param", "linuxproc"))
    yield cluster
    cluster.clear()


@pytest.fixture(scope="session")
def whole(
    linuxproc: Cluster, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """An uninterrupted run of two processes by srun: its folder and the job's output."""
    place = tmp_path_factory.mktemp("whole")
    job, folder = submit(linuxproc, place, images)
    assert linuxproc.wait(job) == "COMPLETED", output(place)
    return folder, output(place)


@pytest.fixture(scope="session")
def whole4(
    linuxproc: Cluster, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The same of four processes by torchrun."""
    place = tmp_path_factory.mktemp("whole4")
    job, folder = submit(linuxproc, place, images, *TWO_EACH, LAUNCHER="torchrun")
    assert linuxproc.wait(job) == "COMPLETED", output(place)
    return folder, output(place)
