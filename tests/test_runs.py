"""`ddp-ssl runs`: the state of each run from its folder alone, and the comparison of some."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddp_ssl.checkpoint import store
from ddp_ssl.commands import runs
from ddp_ssl.logs.writer import MetricsWriter
from ddp_ssl.run import claims
from ddp_ssl.run.configure import load
from ddp_ssl.run.overview import find_runs, overview
from ddp_ssl.run.status import write_status
from ddp_ssl.run.witness import DIED

STEPS = 3000  # rows that are longer than what is read at first


def run_in(
    folder: Path, state: Any = "done", *settings: str, std: float = 0.06, **status: Any
) -> Path:
    """A run of 10 epochs of which the fourth was the best; its embeddings have 128 dimensions."""
    folder.mkdir(parents=True)
    config = load(
        ["method.name=simclr", "model.projector=[512, 128]", "optim.epochs=10", *settings]
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    writer = MetricsWriter(folder, resumed_step=None, offset=None)
    for step in range(STEPS + 1):
        epoch, rest = divmod(step, STEPS // 10)
        if step:
            writer.scalars(
                {"step": step, "epoch": epoch, "train/loss": 1 / step, "perf/x": 0.123456}
            )
        if not rest:  # the validation's row comes after the step's own
            accuracy = 0.9 - 0.01 * abs(epoch - 4)
            spread = std if step else 0.0001
            writer.scalars({"step": step, "epoch": epoch, "eval/knn_top1": accuracy,
                            "rep/embedding_std": spread})  # fmt: skip
        if step == STEPS // 10 * 4:
            path = store.save(folder, {}, step=step, epoch=4, identity={}, world_size=1, keep=2)
            store.save_best(folder, path)
    writer.close()
    write_status(folder, state, step=STEPS, **status)
    return folder


def holder(**changes: Any) -> claims.Holder:
    return dataclasses.replace(claims.this_process(300), **changes)


def claim(folder: Path, silent: float = 0, **changes: Any) -> None:
    """A claim in a folder, whose heartbeat was `silent` seconds ago."""
    path = folder / "claim-1.json"
    path.write_text(json.dumps(dataclasses.asdict(holder(**changes))))
    os.utime(path, (time.time() - silent,) * 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("runs") / "one")


def seen(folder: Path) -> tuple[str, bool]:
    found = overview(folder, claims.this_process(0), time.time())
    return found.state, found.collapsed


def test_a_run_in_a_line(made: Path) -> None:
    found = overview(made, claims.this_process(0), time.time())
    assert (found.state, found.collapsed, found.step) == ("done", False, STEPS)
    assert (found.epoch, found.epochs) == (10, 10)
    assert (found.metric, found.best) == ("eval/knn_top1", 0.9)
    assert abs(found.changed - time.time()) < 600


def test_states(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def state(said: Any, **fields: Any) -> str:
        write_status(folder, said, step=1, **fields)
        return seen(folder)[0]

    assert [state(s) for s in ("done", "preempted", "failed")] == ["done", "stopped", "failed"]
    assert state("running") == "dead"  # no process claims it
    assert state("failed", error=DIED) == "dead"
    claim(folder)
    assert state("running") == "training"
    assert state("preempted") == "training"  # it has just begun again
    claim(folder, silent=60)
    assert state("running") == "stale"  # suspended
    claim(folder, started=1)  # the pid is another process's by now
    assert state("running") == "dead"
    assert state("done") == "done"
    for silent, expected in ((5, "training"), (60, "stale"), (301, "dead")):
        claim(folder, silent, host="n2", machine="another")
        assert state("running") == expected
    (folder / "claim-1.json").write_text("{")
    (folder / "status.json").write_text("{")
    assert seen(folder)[0] == "dead"


def test_a_collapse_is_said(tmp_path: Path) -> None:
    """128 dimensions: isotropic embeddings have 0.088."""
    assert seen(run_in(tmp_path / "a", std=0.004)) == ("done", True)
    assert seen(run_in(tmp_path / "b", std=float("nan"))) == ("done", False)


def test_the_list(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink(made, tmp_path / "linked")
    bare = tmp_path / "sweep" / "lr=0.1"
    bare.mkdir(parents=True)
    write_status(bare, "preempted", step=7)
    old = time.time() - 3 * 86400
    os.utime(bare / "status.json", (old, old))
    (made / "inner").mkdir()  # nobody looks inside a run
    write_status(made / "inner", "done")
    assert runs.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["run", "state", "step", "epoch", "best", "figure", "age"]
    assert cells[2] == [str(bare), "stopped", "7", "-", "-", "-", "3 d"]
    assert cells[3][:6] == [
        str(tmp_path / "linked"), "done", "3000", "10/10", "0.9000", "eval/knn_top1"
    ]  # fmt: skip
    assert len(cells) == 4
    assert find_runs(made) == [made]


def test_the_list_writes_nothing(made: Path) -> None:
    claim(made, 60, host="n2", machine="another")
    before = sorted((path, path.stat().st_mtime_ns) for path in (made, *made.rglob("*")))
    assert runs.listing(made)[2].split("|")[2].strip() == "stale"
    assert sorted((path, path.stat().st_mtime_ns) for path in (made, *made.rglob("*"))) == before
    (made / "claim-1.json").unlink()


def test_no_torch_and_no_runs(tmp_path: Path) -> None:
    code = (
        "import sys; from ddp_ssl.commands import runs; code = runs.main([]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[2])}
    for _ in range(2):  # without the default folder, and with an empty one
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "no runs in runs\n", "")
        (tmp_path / "runs").mkdir(exist_ok=True)


def test_a_comparison(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run_in(tmp_path / "b", "failed", "optim.lr=0.7", "run.dir=x", error="a\nb", std=0.05)
    assert runs.main([str(made), str(other)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"| | {made} | {other} |" in lines
    assert "| state | done | failed |" in lines
    assert "| best | 0.9000 | 0.9000 |" in lines
    assert "| error | - | a b |" in lines
    differing = lines[lines.index("settings that differ:") + 4 : lines.index("last figures:") - 1]
    (line,) = differing
    assert line.startswith("| optim.lr | ")
    assert line.endswith(" | 0.7 |")
    assert "| rep/embedding_std | 0.06 | 0.05 |" in lines
    assert not any("perf/" in line for line in lines)
    assert runs.main([str(made), str(made)]) == 0
    assert "no setting differs" in capsys.readouterr().out


def test_mistakes_are_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = run_in(tmp_path / "damaged")
    with open(damaged / "metrics.jsonl", "a") as file:
        file.write("{half\n")
    for words, text in {
        (str(tmp_path / "none"),): "none: No such file or directory; a folder is accepted",
        (str(made), str(tmp_path)): f"{tmp_path}: no run folder (status.json is not there)",
        (str(made), str(damaged)): "metrics.jsonl: a line is no row of metrics",
        ("--all",): "unrecognized arguments: --all; --help says what is accepted",
    }.items():
        assert runs.main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert text in captured.err
    assert seen(damaged)[0] == "done"  # the list passes over it


def test_ages() -> None:
    seconds = (-3, 0, 119, 120, 7199, 7200, 172799, 172800)
    assert [runs.age(s) for s in seconds] == [
        "0 s", "0 s", "119 s", "2 min", "120 min", "2 h", "48 h", "2 d"
    ]  # fmt: skip
