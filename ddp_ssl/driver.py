"""The GPUs of a machine, found without torch: the driver, device files, the job's GPUs.

    python ddp_ssl/driver.py     prints the pinned set for the driver, cuda12 or cuda13

Imports nothing that has to be installed, since the Makefile asks before anything is.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

CONSTRAINTS = {"cuda13": "constraints.txt", "cuda12": "constraints-cuda12.txt"}
HIDDEN = ("", "-1", "nodevfiles", "none", "void")  # first in CUDA_VISIBLE_DEVICES: the CPU
LOADED = (Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))  # of a driver; the second in WSL
INDICES = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")  # 0 is the first GPU
COUNTS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS")  # 0 is none; also a100:2


class Driver(NamedTuple):
    """An NVIDIA driver: its version, such as `550.54.15`, and the newest CUDA that it runs."""

    version: str
    cuda: str

    @property
    def major(self) -> int:
        """The major version of that CUDA."""
        return int(self.cuda.partition(".")[0])

    def __str__(self) -> str:
        return f"{self.version} (CUDA {self.cuda})"


def find_driver() -> Driver | None:
    """The driver of this machine; None without one."""
    library = _library("libcuda.so.1")
    number = ctypes.c_int(0)
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    return Driver(_version(), f"{number.value // 1000}.{number.value % 1000 // 10}")


def _library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    if found := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text):
        return found.group()
    management, answer = _library("libnvidia-ml.so.1"), ctypes.create_string_buffer(80)
    if management is None or management.nvmlInit_v2():
        return "of unknown version"
    known = management.nvmlSystemGetDriverVersion(answer, 80) == 0
    return answer.value.decode() if known else "of unknown version"


def pinned_set(driver: Driver | None) -> str:
    """The pinned set for a driver; without a driver, the set for the newest CUDA."""
    return "cuda12" if driver is not None and driver.major < 13 else "cuda13"


def install_command(driver: Driver | None) -> str:
    """The command that installs the set for a driver, in a checkout and a new environment."""
    name = pinned_set(driver)
    return f"pip install -c {CONSTRAINTS[name]} -e '.[{name}]'"


def gpu_is_meant() -> str | None:
    """The reason to expect a GPU here, such as `/dev/nvidia0 exists`, or None.

    Nothing counts where CUDA_VISIBLE_DEVICES hides all GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        if visible.partition(",")[0].strip().lower() in HIDDEN:
            return None
        return f"CUDA_VISIBLE_DEVICES={visible}"
    for name in INDICES + COUNTS:
        value = os.environ.get(name, "")
        if value and (name in INDICES or value.rpartition(":")[2] != "0"):
            return f"{name}={value}"
    files = device_files()
    usable = [file for file in files if os.access(file, os.R_OK | os.W_OK)]
    if usable:
        return f"{usable[0]} exists"
    # A job without GPUs may see the files of a GPU node and not open them.
    return "an NVIDIA driver is loaded" if driver_is_loaded() and not files else None


def device_files() -> list[Path]:
    """The GPUs' device files."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def driver_is_loaded() -> bool:
    """Whether the kernel has a driver; its libraries are also on machines without a GPU."""
    return any(path.exists() for path in LOADED)


def why_no_gpu(torch_version: str, built_for: str | None) -> str | None:
    """One line of cause and remedy where a GPU is meant and torch sees none; None otherwise.

    `built_for`: the CUDA that torch is built for, None without.
    """
    meant = gpu_is_meant()
    if meant is None:
        return None
    driver = find_driver()
    mends = f"{install_command(driver)} in a new environment mends it"
    if driver is None:
        cause = "the driver's library libcuda.so.1 is not found"
        mends = "docker run --gpus all, apptainer exec --nv or installing the driver mends it"
    elif driver.major < 12:
        cause = f"the driver is {driver}, which is too old"
        mends = "driver 525 or newer mends it"
    elif built_for is None:
        cause = f"torch {torch_version} is built without CUDA, the driver is {driver}"
    elif driver.major < int(built_for.partition(".")[0]):
        cause = f"torch {torch_version} is built for CUDA {built_for}, the driver is {driver}"
        mends += ", as would driver 580 or newer"
    else:
        cause = f"the driver, {driver}, shows torch {torch_version} no device"
        mends = "nvidia-smi and the job's request for GPUs (sbatch --gpus-per-node) say why"
    return (
        f"{meant}, but torch finds no GPU: {cause}; {mends}; run.device=cpu or "
        "CUDA_VISIBLE_DEVICES='' uses the CPU"
    )


def main() -> None:
    """Print the pinned set, and the reason on standard error."""
    driver = find_driver()
    name = pinned_set(driver)
    where = "no NVIDIA driver, so runs use the CPU" if driver is None else f"driver {driver}"
    print(f"{where}: {CONSTRAINTS[name]}", file=sys.stderr)
    print(name)


if __name__ == "__main__":
    main()
