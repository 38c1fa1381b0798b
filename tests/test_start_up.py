"""Commands import heavy modules late: help and a user's mistakes come at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ddp_ssl.cli import COMMANDS

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "torch._dynamo", "timm", "torchvision", "nvidia.dali", "sklearn", "tensorboard"]

# Runs several commands in one process, one after the other, and says which of the heavy modules
# are there after each.
SCRIPT = """
import contextlib, importlib, io, json, sys
heavy, lines = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for module, *words in lines:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(f"ddp_ssl.{module}").main(words)
        except SystemExit as error:
            code = error.code
    loaded = [name for name in heavy if name in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), loaded]))
"""


def after_each(lines: list[list[str]]) -> list[tuple[int, str, str, list[str]]]:
    """Exit code, both outputs and the heavy modules after each command."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(HEAVY), json.dumps(lines)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


# In this order: a module that one line imports is there for all that follow.
WITHOUT_TORCH = {
    ("train", "--help", "optim"): "optim.lr  (float, default 0.4)",
    ("train", "--help", "data.views"): "data.views.N.count",
    ("train", "--help", "optim.lrr"): "optim.lrr: unknown key; did you mean optim.lr?",
    ("train", "optim.lrr=1"): "did you mean optim.lr?",
    ("train", "lr", "0.3"): "optim.lr=0.3",
    ("train", "cifar/adadin"): "did you mean cifar/adadim",
    ("train", "method.name=simclrr"): "did you mean simclr?",
    ("submit", "--help"): "usage",
    ("commands.prepare_data", "--help"): "usage",
    ("commands.check_data", "--help"): "usage",
    ("commands.pack_shards", "--help"): "usage",
    ("commands.runs", "--help"): "usage",
    ("resume", "--help"): "usage",
    ("commands.reproduce", "--help"): "usage",
}
WITH_TORCH = {
    ("train", "--help"): "method.alpha_every",
    ("train", "--help", "method"): "method.alpha_every",
    ("train", "cifar/vicreg", "--help", "method"): "method.invariance",
    ("train", "--print-config"): "backbone: resnet18",
    ("train", "method.alpha_evry=1"): "did you mean method.alpha_every?",
    ("train", "cifar/adadim", "data.root=/nowhere"): "data.root: /nowhere does not exist",
    ("train", "data.name=folder"): "data.root",
    ("train", "model.backbone=resnt18"): "did you mean resnet18?",
    ("doctor", "--help"): "usage",
    ("doctor", "model.backbone=resnt18"): "did you mean resnet18?",
    ("evaluate", "--help"): "knn.k",
    ("evaluate", "--help", "knn"): "knn.k",
    ("evaluate", "knn", "/nowhere"): "/nowhere",
    ("embed", "--help"): "usage",
    ("export", "--help"): "usage",
    ("commands.plot", "--help"): "usage",
    ("commands.verify", "--help"): "usage",
    ("commands.simulate", "--help"): "usage",
}


def test_help_and_mistakes_import_nothing_that_they_do_not_need() -> None:
    cases = {**WITHOUT_TORCH, **WITH_TORCH}
    assert {module for module, *_ in cases} == {module for module, _ in COMMANDS.values()}
    for case, (code, out, err, loaded) in zip(
        cases, after_each([list(case) for case in cases]), strict=True
    ):
        fine = {"--help", "--print-config"} & set(case) and "optim.lrr" not in case
        assert code == (0 if fine else 2), (case, err)
        assert cases[case] in (out if fine else err), (case, out, err)
        assert loaded == ([] if case in WITHOUT_TORCH else ["torch"]), case
        if "--print-config" not in case:
            assert max(map(len, out.splitlines()), default=0) <= 80, case
        assert len(err.splitlines()) == (0 if fine else 1), (case, err)
