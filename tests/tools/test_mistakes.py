"""docs/mistakes.md: each answer is a line that names what is accepted, and the page has them."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.runs import ROOT, call


def test_typical_mistakes_are_answered_as_the_page_says(tmp_path: Path) -> None:
    page = tmp_path / "mistakes.md"
    command = (sys.executable, "tools/mistakes.py", "--out", str(page))
    done = call(*command, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # the page is a CPU's
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.read_text() == (ROOT / "docs" / "mistakes.md").read_text()
    assert page.read_text().count("\n| `") >= 60
