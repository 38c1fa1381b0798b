"""The versions, hardware, commit, command and job of a run."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ddp_ssl.utils.files import if_readable
from ddp_ssl.utils.programs import output_of

PACKAGES = (
    "ddp_ssl", "torch", "torchvision", "timm", "nvidia-dali", "numpy", "tensorboard", "wandb",
)  # fmt: skip

# Only these variables are kept, since environments hold secrets too.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "NCCL_ALGO",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "WORLD_SIZE",
)


def environment() -> dict[str, Any]:
    """Versions, hardware, commit, command and job, for `environment.json`."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_commit": _commit(),
        "cwd": os.getcwd(),
        "command": shlex.join(sys.orig_argv),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def code_version() -> dict[str, str]:
    """The versions of the packages and the commit that compute the numbers, for checkpoints."""
    numeric = ("ddp_ssl", "torch", "torchvision", "timm", "numpy")
    versions = {
        name.lower(): version
        for name, version in sorted(_versions().items())
        if name.lower() in numeric or name.lower().startswith("nvidia-dali")
    }
    return versions | {"commit": _commit() or "none"}


@functools.cache
def _versions() -> dict[str, str]:
    """Installed versions from the metadata: importing the packages would take seconds."""
    return {
        name: distribution.version
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"]) and name.lower().startswith(PACKAGES)
    }


def _commit() -> str | None:
    """The commit of the code that runs, `-dirty` if it was changed; None outside of git."""
    # An installed package may lie within another repository, which does not track it.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """The output of a git command about this package, or None."""
    here = Path(__file__).parent
    return if_readable(lambda: output_of(["git", *arguments], timeout_s=10, cwd=here).strip())
