"""The tour of the code names files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.py)(?::([\w.]+))?`")


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods: `run`, `Recorder`, `Recorder.flush`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


def test_every_name_of_the_tour_exists() -> None:
    text = (ROOT / "docs/tour.md").read_text()
    named = [*NAME.finditer(text)]
    assert len(named) > 50
    for file, name in (match.groups() for match in named):
        path = ROOT / "ddp_ssl" / file.removeprefix("ddp_ssl/")
        assert path.is_file(), file
        assert name is None or name in definitions(path), f"{file}:{name}"


def test_the_architecture_names_every_part() -> None:
    """The table names every part of the package, and none that is gone."""
    text = (ROOT / "docs/architecture.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("| "))
    named = {name.rstrip("/") for name in re.findall(r"`([a-z_]+(?:/|\.py))`", table)}
    package = ROOT / "ddp_ssl"
    parts = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    parts |= {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert parts <= named
    inside = {"datasets", "loading", "kernels", "common.py"}
    assert named - inside == parts
