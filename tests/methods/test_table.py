"""The floors of tools/methods_table.py."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import methods_table

GOOD = {
    "eval/knn_top1": 0.9,
    "eval/probe_top1": 0.9,
    "rep/effective_rank_r": 20.0,
    "rep/effective_rank_z": 20.0,
    "rep/mutual_information": 1.0,
    "rep/embedding_std": 0.05,
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"rep/embedding_std": 0.02}, "byol: rep/embedding_std 0.02, the floor is 0.02"),
        ({"rep/effective_rank_z": 2.9}, "byol: rep/effective_rank_z 2.9, the floor is 3"),
        ({"eval/knn_top1": 0.71}, "byol: eval/knn_top1 0.71, the floor is 0.72"),
        ({"eval/probe_top1": math.nan}, "byol: not finite or not there: eval/probe_top1"),
    ],
)
def test_a_method_below_a_floor_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, float],
    text: str | None,
) -> None:
    for name, last in {"simclr": GOOD, "byol": GOOD | change}.items():
        rows: list[dict[str, Any]] = [{"step": 0, "epoch": 0, **GOOD, "eval/knn_top1": 0.7}]
        rows.append({"step": 9, "epoch": 1, **last})
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.md").write_text("done")
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["methods_table.py", "--out", str(tmp_path), "--only", "simclr", "byol"]
    monkeypatch.setattr(sys, "argv", command)
    assert methods_table.main() == (text is not None)
    printed = capsys.readouterr().out
    assert "floors: finite; embedding std > 0.02; effective rank of Z > 3" in printed
    assert "simclr:" not in printed
    assert text is None or text in printed
    assert (text is None) == ("byol:" not in printed)
