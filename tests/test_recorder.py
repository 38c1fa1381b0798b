"""The cost of logging, by a clock that the writer and the reduction move."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.distributed import World
from ddp_ssl.training import recorder as recorder_module
from ddp_ssl.training.bad_images import BadImageList
from ddp_ssl.training.rank_skew import RankSkew
from ddp_ssl.training.recorder import Recorder
from ddp_ssl.utils import device_timer
from tests.helpers import config_of


class Writer:
    """Takes a millisecond a row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.now = 0.0

    def scalars(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.now += 1e-3


class Waiting(World):
    """The other processes' figures arrive after half a second."""

    def mean_rows(self, rows: Any) -> Any:
        self.writer.now += 0.5  # type: ignore[attr-defined]
        return rows


@pytest.fixture
def made(tmp_path: Path) -> Any:
    writer = Writer()
    world = Waiting(0, 1, 0, 1, torch.device("cpu"))
    object.__setattr__(world, "writer", writer)
    config = config_of("log.every_steps=5", "optim.epochs=3")
    bad = BadImageList(BadImages(), 10, 0.1, world, tmp_path / "bad.txt")
    found = Recorder(config, world, 6, writer, bad, RankSkew(world, []))  # type: ignore[arg-type]
    found.progress.update = lambda row: None  # type: ignore[method-assign, assignment]
    with patch.object(time, "perf_counter", lambda: writer.now):
        yield found, writer


def costs(writer: Writer) -> dict[int, float]:
    return {row["step"]: row["perf/log_ms"] for row in writer.rows if "perf/log_ms" in row}


def test_logging_costs_what_a_row_costs(made: Any) -> None:
    recorder, writer = made
    for step in range(1, 19):
        recorder.add(step, {"train/loss": torch.tensor(1.0)})
        if recorder.logs(step) or step % 6 == 0:  # the ends of epochs too
            recorder.flush()
    # Nothing has been written when the first row is; then one millisecond each, waiting left out.
    found = costs(writer)
    assert list(found) == [5, 6, 10, 12, 15, 18]
    assert list(found.values()) == pytest.approx([0, 1, 1, 1, 1, 1])


def test_keeping_figures_costs_too(made: Any) -> None:
    recorder, writer = made
    detach = torch.Tensor.detach

    def slow(x: torch.Tensor) -> torch.Tensor:
        writer.now += 1e-3
        return detach(x)

    with patch.object(torch.Tensor, "detach", slow):
        for step in range(1, 6):
            recorder.add(step, {"train/loss": torch.tensor(1.0), "train/more": torch.tensor(1.0)})
    recorder.flush()
    assert costs(writer) == pytest.approx({5: 2})


def test_waiting_for_figures_of_other_names_is_not_logging(made: Any) -> None:
    recorder, writer = made
    recorder.add(1, {"train/loss": torch.tensor(1.0)})
    recorder.add(2, {"train/loss": torch.tensor(1.0), "train/more": torch.tensor(1.0)})
    recorder.add(3, {"train/loss": torch.tensor(1.0), "train/more": torch.tensor(1.0)})
    recorder.flush()
    assert costs(writer) == pytest.approx({1: 0, 3: 1})


def test_a_gpu_that_waits_for_a_batch_is_seen(made: Any) -> None:
    """`next` returns at once, and the GPU's queue stands still for 30 ms in every step."""
    recorder, writer = made
    recorder.world = Waiting(0, 1, 0, 1, torch.device("cuda"))
    object.__setattr__(recorder.world, "writer", writer)
    recorder.restart_clock()
    with (
        patch.object(device_timer, "now", lambda device: "an event"),
        patch.object(device_timer, "seconds_between", lambda before, after: 0.03),
        patch.object(recorder_module, "_memory", lambda device: {"perf/memory_gib": 1.0}),
    ):
        for step in range(1, 6):
            recorder.begin_step(step)
            with recorder.waiting():
                writer.now += 0.01
            writer.now += 0.09
            recorder.add(step, {"train/loss": torch.tensor(1.0)})
        recorder.flush()
    (share,) = [row["perf/data_wait"] for row in writer.rows if "perf/data_wait" in row]
    # 10 ms are the host's own wait; 20 more pass on the GPU. Half a second is the reduction.
    assert share == pytest.approx(5 * 0.03 / (5 * 0.1 + 0.5), abs=1e-6)
