"""Other programs: Slurm's commands, git, nvidia-smi."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def output_of(command: Sequence[str], timeout_s: float = 60, cwd: Path | None = None) -> str:
    """The text that a program prints.

    Raises `OSError`, one line, if the program is missing (`FileNotFoundError`), fails, or has not
    ended after `timeout_s` seconds.
    """
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, cwd=cwd
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]}: no answer within {timeout_s:g} s") from None
    if told.returncode:
        said = (told.stderr or told.stdout).strip().splitlines()
        raise OSError(f"{command[0]}: {said[-1] if said else f'exit code {told.returncode}'}")
    return told.stdout


def queued_jobs() -> set[str]:
    """Numbers of one's jobs that wait or run in Slurm; array tasks as `41_0`. Raises `OSError`."""
    return set(output_of(["squeue", "-h", "-r", "-o", "%i", "-u", str(os.getuid())]).split())
