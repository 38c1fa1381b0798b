"""Alpha in whole runs: rank 0 decomposes, a delay changes only when the value is broadcast."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ddp_ssl.checkpoint import store
from ddp_ssl.config import ConfigError
from ddp_ssl.methods._alpha import Alpha, AlphaConfig
from ddp_ssl.metrics.effective_rank import Matrix
from ddp_ssl.run.identity import check_identity, identity
from ddp_ssl.training import measurement
from tests.helpers import config_of
from tests.ranks import Ranks
from tests.runs import arguments, rows, status, train

WAIT_S = 60
SETTINGS = ("optim.epochs=4", "method.alpha_every=2", "eval.every=0", "measure.every=0")


def alphas(place: Path) -> dict[int, float]:
    """alpha of each step."""
    return {row["step"]: row["rep/alpha"] for row in rows(place) if "train/loss" in row}


@pytest.fixture(scope="module")
def whole(ranks: Ranks, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes, measured after epoch 2 of 4."""
    place = tmp_path_factory.mktemp("delay") / "whole"
    args = arguments(photos, place, *SETTINGS, "method.alpha_delay=1")
    # The batches are read in the background during the last steps of epoch 2.
    assert ranks.launch(opened_at, 2, args, 2) == [[("alpha", 4, "background_0")]] * 2
    return place


def test_the_same_alpha_an_epoch_later(
    ranks: Ranks, photos: Path, whole: Path, tmp_path: Path
) -> None:
    """The first value is that of a run that waits for it: nothing differs until then."""
    args = arguments(photos, tmp_path / "now", *SETTINGS)
    assert ranks.launch(train, 2, args) == [0, 0]
    now, later = alphas(tmp_path / "now"), alphas(whole)
    value = now[7]
    assert value > 0
    assert now == dict.fromkeys(range(1, 7), 0.0) | dict.fromkeys(range(7, 13), value)
    assert later == dict.fromkeys(range(1, 10), 0.0) | dict.fromkeys(range(10, 13), value)
    assert ", measured after epoch 2" in (whole / "train.log").read_text()


def alpha_state(place: Path) -> dict[str, Any]:
    """Alpha in the newest checkpoint of a run."""
    state = torch.load(store.find(place)[0].path, weights_only=True)
    (extra,) = (v for k, v in state["model"].items() if k.endswith("method._extra_state"))
    return dict(extra)


@pytest.mark.parametrize(
    ("size", "route", "mode"), [(1, "gather", "eval"), (3, "gram", "train_stats")]
)
def test_at_any_number_of_processes(
    ranks: Ranks, photos: Path, tmp_path: Path, size: int, route: str, mode: str
) -> None:
    """As many batches with the same bound; each process draws augmentations of its own."""
    more = ("method.alpha_delay=1", f"method.alpha_route={route}", f"method.alpha_mode={mode}")
    args = arguments(photos, tmp_path / "run", *SETTINGS, *more)
    assert ranks.launch(train, size, args) == [0] * size
    extra, found = alpha_state(tmp_path / "run"), alphas(tmp_path / "run")
    assert extra["measured"] is None
    (entry,) = extra["history"]
    assert found[9] == 0.0
    assert found[10] == entry["alpha"]
    assert entry["alpha"] == pytest.approx(entry["effective_rank"] / entry["bound"])
    assert 1 <= entry["effective_rank"] <= entry["bound"]
    assert (entry["epoch"], entry["batches"], entry["bound"]) == (2, 3, 12)


def test_resumed_at_the_end_of_the_measuring_epoch(
    ranks: Ranks, photos: Path, whole: Path, tmp_path: Path
) -> None:
    more = ("method.alpha_delay=1", "checkpoint.every_steps=8")
    args = arguments(photos, tmp_path / "run", *SETTINGS, *more)
    assert ranks.launch(train, 2, args, 7) == ["killed"] * 2
    assert store.find(tmp_path / "run")[0].step == 6
    extra = alpha_state(tmp_path / "run")
    assert len(extra["measured"]["ranks"] or extra["measured"]["matrices"]) == 3
    assert extra["history"] == []
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    assert rows(tmp_path / "run") == rows(whole)


def test_training_and_checkpoints_do_not_wait_for_alpha(
    ranks: Ranks, photos: Path, whole: Path, tmp_path: Path
) -> None:
    """A checkpoint of epoch 3 holds the matrices left, and the resumed run decomposes them."""
    args = arguments(photos, tmp_path / "run", *SETTINGS, "method.alpha_delay=1")
    args += ["checkpoint.every_steps=1"]
    assert ranks.launch(held_and_killed, 2, args, 8) == ["killed"] * 2
    assert store.find(tmp_path / "run")[0].step == 8
    extra = alpha_state(tmp_path / "run")
    assert extra["measured"]["ranks"] is None
    assert len(extra["measured"]["matrices"]) == 3
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    assert rows(tmp_path / "run") == rows(whole)


def held_and_killed(args: list[str], death: int) -> int | str:
    """The decomposition does not end while the run lasts."""
    work, over = Matrix.effective_rank, threading.Event()

    def held(self: Matrix) -> float:
        assert os.environ["RANK"] == "0"
        assert over.wait(WAIT_S), "training or a checkpoint waits for alpha"
        return work(self)

    with patch.object(Matrix, "effective_rank", held):
        try:
            return train(args, death)
        finally:
            over.set()


@pytest.mark.parametrize(
    ("delay", "last", "words"),
    [("null", 4, "not a number"), ("1", 8, "_LinAlgError: did not converge")],
)
def test_a_decomposition_that_fails_on_rank_0_ends_all_ranks(
    ranks: Ranks, photos: Path, tmp_path: Path, delay: str, last: int, words: str
) -> None:
    """With one message, and none hangs; checkpoints saved meanwhile do not mind."""
    args = arguments(photos, tmp_path / "run", *SETTINGS, f"method.alpha_delay={delay}")
    assert ranks.launch(broken_decomposition, 2, args, delay == "1") == [1, 1]
    reason = (
        "alpha: the effective rank of the batches measured after epoch 2 could not be computed "
        f"on rank 0: {words}"
    )
    assert status(tmp_path / "run")["error"] == reason
    assert (tmp_path / "run/train.log").read_text().count(words) == 1
    assert store.find(tmp_path / "run")[0].step == last


def broken_decomposition(args: list[str], raises: bool) -> int | str:
    def broken(self: Matrix) -> float:
        assert os.environ["RANK"] == "0"
        if raises:
            raise torch.linalg.LinAlgError("did not converge")
        return math.nan  # of embeddings that are not finite

    with patch.object(Matrix, "effective_rank", broken):
        return train(args)


def test_longer_delays_and_the_end_of_training(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """Measured after epoch 3 and in use from the sixth on; not measured after epoch 6 of 8."""
    settings = ("optim.epochs=8", "method.alpha_every=3", "eval.every=0", "measure.every=0")
    args = arguments(photos, tmp_path / "run", *settings, "method.alpha_delay=2")
    assert ranks.launch(train, 1, args) == [0]
    found = alphas(tmp_path / "run")
    assert found[16] > 0
    assert found == dict.fromkeys(range(1, 16), 0.0) | dict.fromkeys(range(16, 25), found[16])
    assert (tmp_path / "run/train.log").read_text().count(", measured after epoch ") == 1


def test_with_views_over_several_processes(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """The rows of the first view's holders count, with a delay as without one."""
    found = []
    for more in ("method.alpha_center=true", "method.alpha_delay=1"):
        place = tmp_path / more[-4:]
        args = arguments(photos, place, *SETTINGS, "data.view_shards=2", "method.alpha_center=true")
        assert ranks.launch(train, 4, [*args, more]) == [0] * 4
        found.append(alphas(place)[12])
    assert found[0] == found[1] > 0


def test_batches_that_are_read_ahead_are_those_that_are_read_when_asked_for(
    ranks: Ranks, photos: Path, whole: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "late", *SETTINGS, "method.alpha_delay=1")
    late = ranks.launch(opened_at, 2, args, -1)
    assert late == [[("alpha", 6, "MainThread")]] * 2
    assert rows(tmp_path / "late") == rows(whole)


def opened_at(args: list[str], ahead: int) -> list[tuple[str, int, str]]:
    """For each measurement: its purpose, the steps done when it opens, and the thread."""
    begin, steps, seen = measurement.Measurement._open, [0], []

    def watched(self: Any, purpose: str, *rest: Any) -> Any:
        seen.append((purpose, steps[0], threading.current_thread().name))
        return begin(self, purpose, *rest)

    def counting(job: Any) -> None:
        steps[0] = job.state.step + 1  # the step that begins now

    with (
        patch.object(measurement, "AHEAD", ahead),
        patch.object(measurement.Measurement, "_open", watched),
    ):
        assert train(args, on_step=counting) == 0
    return seen


def test_stopped_while_the_batches_are_read(
    ranks: Ranks, photos: Path, whole: Path, tmp_path: Path
) -> None:
    """The run that goes on reads them again."""
    args = arguments(photos, tmp_path / "run", *SETTINGS, "method.alpha_delay=1")
    assert ranks.launch(train, 2, args, None, None, 4) == [0, 0]
    assert status(tmp_path / "run")["state"] == "preempted"
    assert status(tmp_path / "run")["step"] in (5, 6)
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    assert rows(tmp_path / "run") == rows(whole)


def test_batches_that_only_one_process_cannot_read(
    ranks: Ranks, photos: Path, whole: Path, tmp_path: Path
) -> None:
    """All end together with its reason, and the black images set no alpha."""
    args = arguments(photos, tmp_path / "run", *SETTINGS, "method.alpha_delay=1")
    assert ranks.launch(unreadable_on_rank_1, 2, args) == [1, 1]
    assert status(tmp_path / "run")["error"] == "no image left"
    assert not any(row.get("rep/alpha") for row in rows(tmp_path / "run"))
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    assert rows(tmp_path / "run") == rows(whole)


def unreadable_on_rank_1(args: list[str]) -> int | str:
    from ddp_ssl.data.loading.loader import TrainLoader
    from ddp_ssl.data.loading.reader import UnreadableError

    original, seen = TrainLoader.__next__, [0]

    def broken(self: Any) -> Any:
        seen[0] += len(self.views) == 1
        if os.environ["RANK"] == "1" and len(self.views) == 1 and seen[0] >= 2:
            raise UnreadableError("no image left")
        return original(self)

    with patch.object(TrainLoader, "__next__", broken):
        return train(args)


def test_a_delay_is_shorter_than_the_interval() -> None:
    with pytest.raises(ConfigError, match=r"method\.alpha_delay: expected fewer epochs than"):
        config_of("method.alpha_every=3", "method.alpha_delay=3")
    assert config_of("method.alpha_every=3", "method.alpha_delay=2")


def test_a_run_begun_before_delays_goes_on(tmp_path: Path) -> None:
    """Its identity and its state have no entry for a delay."""
    now = identity(config_of())
    before = {key: value for key, value in now.items() if "alpha_delay" not in key}
    assert len(before) == len(now) - 1
    check_identity(now, before, tmp_path)
    alpha = Alpha(AlphaConfig(), 10)
    alpha.load_state({"alpha": 0.25, "history": []})
    assert alpha.state() == {"alpha": 0.25, "history": [], "measured": None}
    assert json.dumps(alpha.state())
