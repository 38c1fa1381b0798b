"""A GPU that is meant and missing is said in one line; the pinned set serves the driver."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_ssl import distributed, driver
from ddp_ssl.driver import Driver
from tests.ranks import Ranks

ROOT = Path(__file__).parent.parent
OLD = Driver("570.86.10", "12.8")
NEW = Driver("580.95.05", "13.0")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Sets what this machine has: a driver, device files, variables."""

    def has(found: Driver | None, files: tuple[str, ...] = (), **variables: str) -> None:
        monkeypatch.setattr(driver, "find_driver", lambda: found)
        monkeypatch.setattr(driver, "driver_is_loaded", lambda: found is not None)
        monkeypatch.setattr(driver, "device_files", lambda: [Path("/dev") / f for f in files])
        monkeypatch.setattr(os, "access", lambda path, mode: str(path)[-1] != "9")
        for name in ("CUDA_VISIBLE_DEVICES", *driver.INDICES, *driver.COUNTS):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return has


def test_where_nothing_speaks_of_a_gpu_the_cpu_is_meant(machine: Machine) -> None:
    machine(None)
    assert driver.why_no_gpu("2.14.1", "13.0") is None
    for hidden in ("", "-1", "-1,0", "NoDevFiles", "none"):
        machine(OLD, ("nvidia0",), CUDA_VISIBLE_DEVICES=hidden, SLURM_JOB_GPUS="0")
        assert driver.why_no_gpu("2.14.1", "13.0") is None


@pytest.mark.parametrize(
    ("found", "files", "variables", "words"),
    [
        (None, (), {"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1, but torch finds no"),
        (
            None,
            (),
            {"SLURM_JOB_GPUS": "0"},
            "SLURM_JOB_GPUS=0, but torch finds no GPU: the driver's",
        ),
        (None, (), {"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2, but torch finds no GPU"),
        (None, ("nvidia0", "nvidia1"), {}, "/dev/nvidia0 exists, but torch finds no GPU"),
        (None, (), {"SLURM_GPUS": "a100:2"}, "SLURM_GPUS=a100:2, but torch finds no GPU"),
        (OLD, (), {}, "an NVIDIA driver is loaded, but torch finds no GPU: torch 2.14.1 is built"),
    ],
)
def test_what_speaks_of_a_gpu(
    machine: Machine, found: Any, files: Any, variables: Any, words: str
) -> None:
    machine(found, files, **variables)
    line = driver.why_no_gpu("2.14.1", "13.0")
    assert line is not None
    assert line.startswith(words)
    assert "\n" not in line


def test_a_job_without_gpus_means_the_cpu(machine: Machine) -> None:
    """Also on a GPU node, whose device files it sees and may not open."""
    for variables in ({"SLURM_GPUS_ON_NODE": "0"}, {"SLURM_GPUS": "a100:0"}):
        machine(None, **variables)
        assert driver.gpu_is_meant() is None
    machine(NEW, ("nvidia9",))
    assert driver.gpu_is_meant() is None
    machine(NEW, ("nvidia1", "nvidia9"))
    assert driver.gpu_is_meant() == "/dev/nvidia1 exists"


def test_libraries_alone_are_no_driver(machine: Machine, monkeypatch: Any) -> None:
    machine(NEW)
    monkeypatch.setattr(driver, "driver_is_loaded", lambda: False)
    assert driver.why_no_gpu("2.14.1", "13.0") is None


@pytest.mark.parametrize(
    ("found", "built_for", "cause", "remedy"),
    [
        (OLD, "13.0", "torch 2.14.1 is built for CUDA 13.0, the driver is 570.86.10 (CUDA 12.8)",
         "pip install -c constraints-cuda12.txt -e '.[cuda12]' in a new environment mends it, as"),
        (NEW, None, "torch 2.14.1 is built without CUDA, the driver is 580.95.05 (CUDA 13.0)",
         "pip install -c constraints.txt -e '.[cuda13]' in a new environment mends it"),
        (NEW, "13.0", "the driver, 580.95.05 (CUDA 13.0), shows torch 2.14.1 no device",
         "nvidia-smi"),
        (Driver("470.57.02", "11.4"), "12.8", "driver is 470.57.02 (CUDA 11.4), which is too old",
         "driver 525 or newer"),
        (None, "13.0", "libcuda.so.1 is not found", "docker run --gpus all"),
    ],
)  # fmt: skip
def test_cause_and_remedy(
    machine: Machine, found: Any, built_for: str | None, cause: str, remedy: str
) -> None:
    machine(found, ("nvidia0",))
    line = driver.why_no_gpu("2.14.1", built_for)
    assert line is not None
    assert cause in line
    assert remedy in line.split(cause)[1]
    assert line.endswith("run.device=cpu or CUDA_VISIBLE_DEVICES='' uses the CPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_process_refuses_to_start(machine: Machine, monkeypatch: Any) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    machine(NEW)
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"^run.device: .*driver, 580.95.05"):
            distributed.start(device)
    assert distributed.start("cpu").device.type == "cpu"
    machine(NEW, CUDA_VISIBLE_DEVICES="")
    assert distributed.start("auto").device.type == "cpu"


def start_without(device: str, rank_without: int) -> str:
    """What `start` raises where one rank lacks the GPU that is meant for it."""
    lacks = int(os.environ["RANK"]) == rank_without
    before, distributed.world.why_no_gpu = (
        distributed.world.why_no_gpu,
        lambda *_: "no GPU" if lacks else None,
    )
    try:
        distributed.start(device, 60)
    except distributed.Disagreement as error:
        return str(error)
    finally:
        distributed.world.why_no_gpu = before
    return "started"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_processes_refuse_together(ranks: Ranks) -> None:
    place = f"({socket.gethostname()})"
    said = f"run.device: rank 1 {place}: no GPU"
    assert ranks.launch(start_without, 3, "auto", 1) == [said] * 3
    assert ranks.launch(start_without, 3, "auto", 9) == ["started"] * 3
    said = f"run.device: rank 0 {place}: cuda is not available here; auto or cpu would be accepted"
    assert ranks.launch(start_without, 2, "cuda", 9) == [said] * 2


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_driver_too_old_for_torch(tmp_path: Path) -> None:
    """A library that says what the driver before torch's CUDA says: run, doctor, make."""
    major = int((torch.version.cuda or "13").partition(".")[0])
    says = major * 1000 - 920  # 12.8 where torch is built for 13
    code = {
        "libcuda.so.1": f"int cuDriverGetVersion(int* v) {{ *v = {says}; return 0; }}",
        "libnvidia-ml.so.1": "#include <string.h>\nint nvmlInit_v2() { return 0; }\n"
        'int nvmlSystemGetDriverVersion(char* s, int n) { strcpy(s, "555.42.02"); return 0; }',
    }
    for name, text in code.items():
        source = tmp_path / f"{name}.c"
        source.write_text(text)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / name, source], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip

    chosen = call("ddp_ssl/driver.py")
    assert chosen.stdout == "cuda12\n"
    assert chosen.stderr.startswith(f"driver 555.42.02 (CUDA {major - 1}.8): constraints-cuda")
    done = call("-m", "ddp_ssl.train", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddp_ssl: error: run.device: CUDA_VISIBLE_DEVICES=0, but torch finds")
    assert f"the driver is 555.42.02 (CUDA {major - 1}.8)" in line
    assert ("constraints-cuda12.txt" in line) == (major == 13)
    assert not (tmp_path / "run").exists()


def test_the_pinned_sets_differ_in_what_is_built_for_cuda_alone() -> None:
    def pins(name: str) -> set[str]:
        lines = (ROOT / name).read_text().splitlines()
        assert lines[0].startswith("# For a driver of CUDA 1")
        assert all("==" in line for line in lines[1:])
        return set(lines[1:])

    new, old = (pins(name) for name in driver.CONSTRAINTS.values())
    built = ("nvidia-", "cuda-", "torch==", "torchvision==", "triton==")
    assert {line for line in new ^ old if not line.startswith(built)} == set()
    assert any(line.startswith("nvidia-dali-cuda130==") for line in new)
    assert any(line.startswith("nvidia-dali-cuda120==") for line in old)
    assert not any("-cu12==" in line for line in new)
    assert not any("-cu13==" in line for line in old)
