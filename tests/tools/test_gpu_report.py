"""The report of a GPU: rehearsed as a whole on this machine, its parts by themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import gpu_report
from gpu_report import Count, Report

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_report.sh"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.faults
def test_the_rehearsal_has_every_row_and_no_error(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        [SCRIPT, tmp_path / "out", "--rehearse", "--minutes", "12"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "out")
    assert [row for row in rows if "error" in row] == []
    assert list(dict.fromkeys(row["group"] for row in rows)) == list(gpu_report.GROUPS)
    steps = {(r["network"], r["norm"], r["images"]) for r in rows if r["group"] == "steps"}
    assert len(steps) == 3 * 3 * 2 + 1
    figures = "ms", "kernels", "counted_gib"
    assert all(r[name] > 0 for r in rows if r["group"] == "steps" for name in figures)
    runs = [r for r in rows if r["group"] == "whole"]
    assert [r["run"] for r in runs] == [
        "and a CPU's", "stopped at 15 and resumed", "fp16", "fp16, AdamW"
    ]  # fmt: skip
    parts = [r["part"] for r in rows if r["group"] == "vit" and r["method"] == "lejepa"]
    assert parts == ["fp32", "tf32", "step", "optim.accumulate=4", "model.checkpointing=true"]
    inputs = [r["source"] for r in rows if r["group"] == "images" and "source" in r]
    assert inputs == ["folder", "folder", "folder", "parquet", "folder"]
    loaders = [r["setting"] for r in rows if r["group"] == "images" and "setting" in r]
    assert loaders == list(gpu_report.SETTINGS)
    (knn,) = (r for r in rows if r.get("what") == "evaluate knn")
    if not torch.cuda.is_available():
        assert knn["top1"] == knn["on_a_cpu"]
        assert [r["largest"] for r in runs[:2]] == [0, 0]
        assert runs[2]["largest"] > 0
    assert len(rows) >= 30
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"\n## {group}\n" in table for group in gpu_report.GROUPS)
    again = subprocess.run(
        [SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "has a report already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "usage"), (["x", "--minute"], "usage"), (["x", "--minutes", "soon"], "a whole number")],
)
def test_the_script_refuses(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_group_without_time_is_a_row(tmp_path: Path) -> None:
    """No minute left: every group is left out, and said."""
    subprocess.run([SCRIPT, tmp_path / "out", "--rehearse", "--minutes", "0"], check=True)
    rows = rows_of(tmp_path / "out")
    assert [row["group"] for row in rows] == list(gpu_report.GROUPS)
    assert all("left out" in row["left_out"] for row in rows)


def test_a_measurement_that_fails_is_a_row_and_the_next_goes_on(tmp_path: Path) -> None:
    report = Report("steps", tmp_path, rehearse=True)
    report.measure(5, lambda: {"ms": 1.25}, network="a")
    report.measure(5, lambda: {}["none"], network="b")
    report.measure(0.2, lambda: time.sleep(9) or {}, network="c")
    report.measure(5, lambda: {"ms": 2.0}, network="d")
    assert rows_of(tmp_path) == [
        {"group": "steps", "network": "a", "ms": 1.25},
        {"group": "steps", "network": "b", "error": "KeyError: 'none'"},
        {"group": "steps", "network": "c", "error": "TimeoutError: stopped after 0.2 s"},
        {"group": "steps", "network": "d", "ms": 2.0},
    ]
    table = (tmp_path / "table.md").read_text()
    assert table.count("## steps") == 1
    assert "| d | 2 |" in table
    assert report.rates() is None


def test_bytes_and_operations_of_a_product() -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 16)
    with Count((1e3, 1e6)) as count:
        c = a @ b
        c.t().add_(1)
    assert count.nbytes == 4 * (4 * 8 + 8 * 16 + 4 * 16) + 4 * 2 * 4 * 16
    assert count.flops == 2 * 4 * 8 * 16
    assert count.seconds == pytest.approx(count.nbytes / 1e3)
    with Count((1e3, 1e6)) as count:
        torch.add(c, 1, out=c)
        c.copy_(b[:4])
    assert count.nbytes == 4 * (2 * 4 * 16 + 2 * 4 * 16)
    with Count((1e9, 1e3)) as count:
        torch.ones(4, 1).expand(4, 100).sum()
        _ = a @ b
    assert count.seconds == pytest.approx(1.024, rel=1e-3)
