"""docs/add-a-method.md, followed literally from an empty folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.runs import BIN, ROOT, arguments, call, rows

DOCUMENT = ROOT / "docs" / "add-a-method.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_the_documents_method_trains(photos: Path, tmp_path: Path) -> None:
    """Its file and its YAML, nothing else, with both commands."""
    (file, *_), (recipe,) = blocks("python"), blocks("yaml")
    (tmp_path / "my_module.py").write_text(file)
    (tmp_path / "my.yaml").write_text(recipe)
    skipped = ("/", "method.", "data.name=", "log.every_steps=")
    tiny = [a for a in arguments(photos, tmp_path / "run") if not a.startswith(skipped)]
    # In float32: see test_mixed_precision_runs for bf16 and images of 16 px.
    tiny += ["optim.epochs=1", "optim.warmup_epochs=0", "optim.precision=fp32"]

    script = call(
        str(BIN / "ddp-ssl"), "train", "my.yaml", *tiny, cwd=tmp_path, OMP_NUM_THREADS="1"
    )
    assert script.returncode == 0, script.stderr[-3000:]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 3)
    assert any("train/nce" in row for row in rows(tmp_path / "run"))

    module = (sys.executable, "-m", "ddp_ssl.train", "my.yaml", "--print-config")
    printed: subprocess.CompletedProcess[str] = call(*module, f"data.root={photos}", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    lines = [line.strip() for line in printed.stdout.splitlines()]
    assert any(re.fullmatch(r"name: my_module:MyMethod +# my\.yaml", line) for line in lines)
    assert any(re.fullmatch(r"temperature: 0\.2 +# my\.yaml", line) for line in lines)
