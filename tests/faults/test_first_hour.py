"""tools/first_hour.sh: what a new user does first, on a folder of pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
STAMPS = "/usr/share/tuxpaint/stamps"
STEPS = ("choices", "train", "resume", "method", "evaluate", "export", "load")


@pytest.mark.long
@pytest.mark.faults
def test_the_first_hour(tmp_path: Path) -> None:
    """On Debian's stamps where they are installed, else on pictures that it draws.

    Its paths are relative, and it changes the folder.
    """
    place = tmp_path / "hour"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [str(ROOT / "tools/first_hour.sh"), "hour", os.path.relpath(STAMPS, tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=1500,
        env=clean | {"PATH": path, "PYTHON": os.path.relpath(sys.executable, tmp_path),
                     "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((place / f"{name}.log").is_file() for name in STEPS)
    assert "a side: preset/" in done.stdout
    assert "SIGTERM: stopping as soon as possible" in done.stdout
    assert done.stdout.rstrip().endswith(" parameters")
