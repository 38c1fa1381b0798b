"""The trace of a few steps: which steps, on which ranks, and a trace that cannot be written."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_ssl.config import ConfigError
from ddp_ssl.distributed import World
from ddp_ssl.run.configure import load
from ddp_ssl.training.profiler import Profiler
from tests.helpers import config_of

CPU = torch.device("cpu")


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, rank, size, CPU)


def loop(profiler: Profiler, first: int, end: int, before: bool = False) -> None:
    """Steps `first` to `end` - 1, each a matrix product of its own size."""
    if before:
        profiler.step(first)
    for step in range(first, end):
        torch.ones(100 + step, 7) @ torch.ones(7, 7)
        profiler.step(step + 1)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def traced(path: Path) -> list[int]:
    """The steps in a trace, each with an operator within it."""
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    products = [e for e in events if e.get("name") == "aten::mm"]
    steps = {}
    for event in events:
        name = re.fullmatch(r"step (\d+)", str(event.get("name")))
        if name and event.get("cat") == "user_annotation":
            end = event["ts"] + event["dur"]
            steps[int(name[1])] = sum(event["ts"] <= p["ts"] < end for p in products)
    assert all(steps.values()), steps
    assert len(products) == len(steps)  # nothing of the steps outside
    return sorted(steps)


def test_the_steps_of_the_window_are_traced(tmp_path: Path) -> None:
    profiler = Profiler(config_of("run.profile=3:6"), world(), tmp_path)
    loop(profiler, 0, 5)
    assert not (tmp_path / "profile").exists()
    loop(profiler, 5, 9)
    profiler.close()
    folder = tmp_path / "profile"
    assert traced(folder / "rank0.json.gz") == [3, 4, 5]
    assert "aten::mm" in (folder / "rank0.txt").read_text()
    assert sorted(p.name for p in folder.iterdir()) == ["rank0.json.gz", "rank0.txt"]


def test_rank_0_and_the_last_rank_write(tmp_path: Path) -> None:
    for rank in range(3):
        profiler = Profiler(config_of("run.profile=1:2"), world(rank, 3), tmp_path)
        loop(profiler, 0, 3)
        profiler.close()
    names = sorted(p.name for p in (tmp_path / "profile").iterdir())
    assert names == ["rank0.json.gz", "rank0.txt", "rank2.json.gz"]
    assert traced(tmp_path / "profile" / "rank2.json.gz") == [1]


@pytest.mark.parametrize(("before", "steps"), [(True, [0, 1]), (False, [1])])
def test_the_first_step_needs_a_call_before_it(
    tmp_path: Path, before: bool, steps: list[int]
) -> None:
    profiler = Profiler(config_of("run.profile=0:2"), world(), tmp_path)
    loop(profiler, 0, 3, before)
    assert traced(tmp_path / "profile" / "rank0.json.gz") == steps


def test_a_run_that_stops_within_the_window_writes_what_it_has(tmp_path: Path) -> None:
    profiler = Profiler(config_of("run.profile=2:100"), world(), tmp_path)
    loop(profiler, 0, 4)
    profiler.close()
    # The step under way is there too, without an operator: it was not taken.
    with gzip.open(tmp_path / "profile" / "rank0.json.gz", "rt") as file:
        names = {str(e.get("name")) for e in json.load(file)["traceEvents"]}
    assert {"step 2", "step 3"} <= names
    assert "step 1" not in names
    assert "step 5" not in names


def test_a_resumed_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Within the window the rest is traced; behind it nothing, and it is said."""
    profiler = Profiler(config_of("run.profile=2:6"), world(), tmp_path / "within")
    loop(profiler, 4, 8, before=True)
    profiler.close()
    assert traced(tmp_path / "within" / "profile" / "rank0.json.gz") == [4, 5]
    assert not warnings(caplog)

    profiler = Profiler(config_of("run.profile=2:6"), world(), tmp_path / "behind")
    loop(profiler, 6, 8, before=True)
    profiler.close()
    assert not (tmp_path / "behind").exists()
    assert warnings(caplog) == ["run.profile: the run was at none of the steps 2 to 5"]


def test_a_run_too_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiler = Profiler(config_of("run.profile=50:60"), world(), tmp_path)
    loop(profiler, 0, 3)
    profiler.close()
    assert "at none of the steps 50 to 59" in caplog.text


def test_a_failing_write_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    profiler = Profiler(config_of("run.profile=0:1"), world(), tmp_path)
    loop(profiler, 0, 2, before=True)
    profiler.close()
    (text,) = warnings(caplog)
    assert text.startswith("run.profile: no whole trace of rank 0, going on: ")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    profiler = Profiler(config_of("run.profile=0:1"), world(), tmp_path / "full")
    loop(profiler, 0, 2, before=True)
    assert "No space left" in warnings(caplog)[-1]
    assert list((tmp_path / "full" / "profile").iterdir()) == []


def test_unset_it_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.profiler, "profile")  # it would raise at any use
    profiler = Profiler(config_of(), world(), tmp_path)
    loop(profiler, 0, 3)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("window", ["20", "23:20", "3:3", "-1:4", "a:b", "1:2:3"])
def test_the_window_is_checked(window: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([f"run.profile={window}"])
    assert str(error.value) == (
        f"run.profile: expected FROM:TO with FROM < TO, such as 20:23, got {window}"
    )


def test_a_window_is_no_number_to_base_60(tmp_path: Path) -> None:
    resolved = load(["run.profile=20:23"])
    assert resolved.config.run.profile == "20:23"
    path = tmp_path / "config.yaml"
    path.write_text(resolved.to_yaml())
    assert load([str(path)]).config.run.profile == "20:23"
    path.write_text("run:\n  profile: 20:23\n")
    assert load([str(path)]).config.run.profile == "20:23"
