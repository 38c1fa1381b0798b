"""Other programs: Slurm's commands, git, nvidia-smi."""

from __future__ import annotations

import os
import re
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


def scontrol_fields(*words: str) -> dict[str, str]:
    """`Name=value` between blanks, as `scontrol show job -o` prints them. Raises `OSError`."""
    return dict(re.findall(r"(\S+?)=(\S*)", output_of(["scontrol", *words], timeout_s=20)))


def slurm_seconds(text: str) -> int:
    """Seconds of a time in Slurm's form: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; or `ValueError`."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise ValueError(f"{text!r} is not a time such as 24:00:00 or 2-12:00:00")
    days, *clock = found.groups()
    parts = [int(part) for part in clock if part]
    if days is None and len(parts) < 3:
        parts = [0, *parts]  # no hours
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def queued_jobs() -> set[str]:
    """Numbers of one's jobs that wait or run in Slurm; array tasks as `41_0`. Raises `OSError`."""
    return set(output_of(["squeue", "-h", "-r", "-o", "%i", "-u", str(os.getuid())]).split())
