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


PACKAGE = TESTS.parent / "ddp_ssl"

# The parts of the package, the highest layer first. A part imports from lower layers only.
LAYERS = [
    {"cli"},
    {"submit", "resume"},  # they run `train`
    {"train", "evaluate", "embed", "doctor"},
    {"export"},
    {"commands"},
    {"reproduction", "checks"},
    {"training"},
    {"evals"},
    {"run"},
    {"methods"},
    {"data"},
    {"metrics", "models", "optim"},
    {"losses"},
    {"distributed"},
    {"config"},
    {"checkpoint", "logs"},
    {"utils"},
    {"comm", "driver", "errors"},
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
TO_DALI = {"ddp_ssl.data.loading.dali"}


def module_of(path: Path) -> str:
    """Dotted name of a file of the package."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, also within functions."""
    found = set()
    for name in imported(FILES[module]):
        while name.startswith("ddp_ssl") and name not in FILES:
            name = name.rpartition(".")[0]
        if name.startswith("ddp_ssl"):
            found.add(name)
    return found - {module}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_parts_import_only_from_lower_layers() -> None:
    parts = {part_of(module) for module in FILES} - {""}
    assert parts == set(LAYER)
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports_of(module)
        if part_of(module) and part_of(other) and part_of(module) != part_of(other)
        and LAYER[part_of(other)] <= LAYER[part_of(module)]
    ]  # fmt: skip
    assert wrong == []


def test_no_imports_go_in_a_circle() -> None:
    """Nor within a package. Its `__init__` stands for all of it and is left out."""
    left = {
        module: {m for m in imports_of(module) if FILES[m].name != "__init__.py"}
        for module, path in FILES.items()
        if path.name != "__init__.py"
    }
    while leaves := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in leaves}
    assert left == {}


def test_data_sets_know_no_loading() -> None:
    """`data/datasets` says which images there are; `data/loading` makes batches of them."""
    sets = [module for module in FILES if module.startswith("ddp_ssl.data.datasets")]
    assert len(sets) > 10
    wrong = [(m, o) for m in sets for o in imports_of(m) if o.startswith("ddp_ssl.data.loading")]
    assert wrong == []


def test_torch_distributed_and_dali_have_one_importer() -> None:
    def importers(*starts: str) -> set[str]:
        return {m for m, path in FILES.items() if any(n.startswith(starts) for n in imported(path))}

    assert {part_of(m) for m in importers("torch.distributed")} == {"distributed"}
    assert {m for m, path in FILES.items() if '"nvidia.dali' in path.read_text()} == TO_DALI


def test_losses_and_metrics_import_torch_and_comm_alone() -> None:
    for part in ("losses", "metrics"):
        for module in (m for m in FILES if part_of(m) == part):
            others = {part_of(other) for other in imports_of(module)} - {part, ""}
            assert others <= {"comm"}, module


def test_config_imports_no_torch() -> None:
    for module in (m for m in FILES if part_of(m) == "config"):
        assert not any(name.startswith("torch") for name in imported(FILES[module])), module


def test_the_top_of_the_package_holds_commands_and_little_else() -> None:
    assert len([*PACKAGE.glob("*.py")]) <= 16
    long = {m: len(path.read_text().splitlines()) for m, path in FILES.items()}
    assert {module: lines for module, lines in long.items() if lines > 560} == {}


def test_the_loop_is_a_page() -> None:
    tree = ast.parse((PACKAGE / "training/loop.py").read_text())
    (loop,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 80
