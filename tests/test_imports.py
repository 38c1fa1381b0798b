"""Which module may import which."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported(path: Path) -> list[str]:
    """Dotted names of all that a file imports, also within functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_no_module_of_the_tests_imports_a_test_module() -> None:
    """Fixtures and functions that several tests need stand in modules of their own."""
    modules = {path.stem for path in TESTS.rglob("test_*.py")}
    assert len(modules) > 50
    wrong = [
        f"{path.relative_to(TESTS)}: {name}"
        for path in TESTS.rglob("*.py")
        for name in imported(path)
        if name.startswith("tests.") and modules & set(name.split("."))
    ]
    assert wrong == []
