"""The wheel alone, without a checkout: it holds every file, and its commands run anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAMPS = "/usr/share/tuxpaint/stamps"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, since a build leaves files there."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("ddp_ssl", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(copy / "made"), str(copy))
    (made,) = (copy / "made").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and this environment's packages but for ddp_ssl."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, symlinks=True)
    executable = place / "bin" / "python"
    (packages,) = place.glob("lib/python*/site-packages")
    # This path comes last, and Python does not read the .pth files in it (an editable ddp_ssl's).
    (packages / "pinned.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    pip("--python", str(executable), "install", "--no-deps", str(wheel))
    return executable


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=without_checkout())
    assert done.returncode == 0, done.stdout + done.stderr


def without_checkout() -> dict[str, str]:
    """The environment without PYTHONPATH: pip takes a checkout there for an installed ddp_ssl."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(*command: str | Path, empty: Path) -> str:
    """The output of a command that is started in an empty folder, without this checkout."""
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=empty, env=without_checkout()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [
        path.relative_to(ROOT)
        for folder in ("ddp_ssl", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    inside = {f"ddp_ssl/{f}" if f.parts[0] == "configs" else str(f) for f in files}
    assert {"ddp_ssl/py.typed", "ddp_ssl/configs/imagenet100/adadim.yaml"} <= inside
    assert held == inside


def test_the_commands_of_the_wheel_run_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    ddp_ssl = python.with_name("ddp-ssl")
    where = run(python, "-c", "import ddp_ssl; print(ddp_ssl.__file__)", empty=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    assert "\n  check-data" in run(ddp_ssl, "--help", empty=tmp_path)
    config = run(ddp_ssl, "train", "imagenet100/adadim", "--print-config", empty=tmp_path)
    assert "ddp_ssl/configs/imagenet100/adadim.yaml" in config
    assert "name: imagenet100 " in config
    assert "figure18" in run(ddp_ssl, "reproduce", "--list", empty=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.faults
def test_the_demo_of_the_wheel_runs_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    keys = ("optim.epochs=1", "run.device=cpu", "run.threads=1", "run.dir=made")
    run(python, "-m", "ddp_ssl.train", *keys, empty=tmp_path)
    assert json.loads((tmp_path / "made" / "status.json").read_text())["state"] == "done"


@pytest.mark.long
@pytest.mark.faults
def test_the_first_hour_of_the_wheel(python: Path, tmp_path: Path) -> None:
    """tools/first_hour.sh on Debian's stamps where they are installed, else on drawn pictures.

    Its paths are relative, and it changes the folder.
    """
    relative = [os.path.relpath(path, tmp_path) for path in (STAMPS, python)]
    done = subprocess.run(
        [ROOT / "tools/first_hour.sh", "hour", relative[0]],
        cwd=tmp_path, capture_output=True, text=True, timeout=1500,
        env=without_checkout() | {"PATH": f"{python.parent}:{os.environ['PATH']}",
                                  "PYTHON": relative[1], "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{python.parents[1].resolve()}/lib/")
    steps = ("choices", "train", "resume", "method", "evaluate", "export", "load")
    assert all((tmp_path / "hour" / f"{name}.log").is_file() for name in steps)
    assert "a side: preset/" in done.stdout
    assert "SIGTERM: stopping as soon as possible" in done.stdout
    assert done.stdout.rstrip().endswith(" parameters")
