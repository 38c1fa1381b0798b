"""Checkpoints written beside training: what is copied, and that training does not wait."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ddp_ssl.checkpoint import store
from ddp_ssl.checkpoint.saver import HostCopy, Outcome, Saver
from ddp_ssl.errors import CheckpointError
from tests.ranks import Ranks
from tests.runs import BARE, WAIT_S, Whole, Writes, arguments, assert_same_bits, rows, status, train


def test_a_copy_is_equal_and_independent() -> None:
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    state = {
        "model": {"w": weight, "n": torch.tensor(3), "half": torch.randn(5).bfloat16()},
        "list": [1, {"x": torch.arange(4)[::2]}],
        "pair": (torch.zeros(0), "text", None, 1.5),
        "bytes": b"abc",
    }
    copy = HostCopy().copy(state)
    assert copy["model"]["w"].stride() == weight.stride()
    assert torch.equal(copy["list"][1]["x"], torch.tensor([0, 2]))
    assert copy["model"]["half"].dtype == torch.bfloat16
    assert (copy["pair"][1:], copy["bytes"], copy["model"]["n"]) == (("text", None, 1.5), b"abc", 3)
    before = weight.clone()
    weight += 1
    state["list"][1]["x"] = None  # type: ignore[index]
    state["model"]["new"] = 1  # type: ignore[index]
    assert torch.equal(copy["model"]["w"], before)
    module = torch.nn.Linear(2, 2)
    saved = HostCopy().copy({"model": module.state_dict()})["model"]
    assert saved._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]
    assert copy["list"][1]["x"] is not None
    assert "new" not in copy["model"]


def test_a_copy_of_a_part_saves_the_part() -> None:
    """A view does not drag its whole storage into the file."""
    copy = HostCopy().copy(
        {"row": torch.zeros(1000, 1000)[3], "column": torch.zeros(1000, 1000)[:, 3]}
    )
    assert [x.untyped_storage().nbytes() for x in copy.values()] == [4000, 4000]


def test_memory_is_kept_while_the_shape_is() -> None:
    copies, queue = HostCopy(), torch.zeros(8)
    first = copies.copy({"w": torch.ones(4), "queue": queue})
    addresses = {name: x.data_ptr() for name, x in first.items()}
    second = copies.copy({"w": torch.full((4,), 2.0), "queue": queue.repeat(2), "new": queue})
    assert second["w"].data_ptr() == addresses["w"]
    assert second["w"].tolist() == [2.0] * 4
    assert second["queue"].shape == (16,)
    gaps = torch.arange(12.0).view(3, 4)[:, :3]
    one, two = (copies.copy({"gaps": gaps})["gaps"] for _ in range(2))
    assert one.data_ptr() == two.data_ptr()
    assert torch.equal(two, gaps)
    third = copies.copy({"w": torch.ones(4, dtype=torch.int64)})
    assert third["w"].dtype == torch.int64
    assert third["w"].tolist() == [1] * 4


def test_a_copy_is_written_while_the_state_goes_on() -> None:
    saver, held, written = Saver(), threading.Event(), []
    weight = torch.ones(3)

    def write(state: dict[str, Any]) -> None:
        assert held.wait(WAIT_S)
        written.append(state["w"].tolist())

    saver.start({"w": weight}, write)
    weight += 1
    assert saver.outcome(block=False) is None
    with pytest.raises(RuntimeError, match="still being written"):
        saver.start({"w": weight}, write)
    held.set()
    assert saver.outcome(block=True) == Outcome("")
    assert written == [[1.0] * 3]
    assert saver.outcome(block=True) is None
    saver.close()


def test_what_went_wrong_is_told() -> None:
    def full(state: dict[str, Any]) -> None:
        raise CheckpointError("step_1.pt: No space left on device")

    def unsafe(state: dict[str, Any]) -> None:
        raise TypeError("the state to save cannot be loaded safely")

    saver = Saver()
    saver.start({}, full)
    assert saver.outcome(block=True) == Outcome("step_1.pt: No space left on device")
    saver.again()
    assert saver.outcome(block=True) == Outcome("step_1.pt: No space left on device")
    saver.start({}, unsafe)
    problem, fatal = saver.outcome(block=True) or Outcome("")
    assert (problem, fatal) == ("TypeError: the state to save cannot be loaded safely", True)
    saver.start({}, lambda state: None)
    assert saver.outcome(block=True) == Outcome("")
    saver.close()


# --- in a run ----------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    """Step 3's is held until step 5 begins, and is the same file as one that nobody held."""
    more = (*BARE, "checkpoint.every_steps=0", "checkpoint.keep=5")
    args = arguments(photos, tmp_path / "held", *more)
    assert ranks.launch(holding, 2, args, str(tmp_path / "held")) == [0, 0]
    assert ranks.launch(train, 2, [*args, f"run.dir={tmp_path / 'free'}"]) == [0, 0]
    held, free = (store.find(tmp_path / name) for name in ("held", "free"))
    assert [found.step for found in held] == [found.step for found in free] == [9, 6, 3]
    for mine, theirs in zip(held, free, strict=True):
        left, right = (torch.load(found.path, weights_only=True) for found in (mine, theirs))
        for part in ("model", "optimizer"):
            assert_same_bits(left[part], right[part])
        assert (left["step"], left["best"]) == (right["step"], right["best"])
    assert rows(tmp_path / "held") == rows(tmp_path / "free")


def holding(args: list[str], place: str) -> int | str:
    save, reached = store.save, threading.Event()

    def fifth(job: Any) -> None:
        if job.state.step == 4:
            if os.environ["RANK"] == "0":
                assert not list((Path(place) / "checkpoints").glob("step_*"))
                assert status(Path(place))["step"] == 0
            reached.set()

    def held(*rest: Any, **more: Any) -> Path:
        assert reached.wait(WAIT_S), "training waits for the checkpoint"
        return save(*rest, **more)

    with patch.object(store, "save", held):
        return train(args, on_step=fifth)


def test_a_run_ends_only_after_its_checkpoint(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    """An error in a step does not lose what is being written; the run goes on from there."""
    args = arguments(photos, tmp_path / "run", *BARE, "checkpoint.every_steps=0")
    assert ranks.launch(broken_while_writing, 1, args) == ["1"]
    assert [found.step for found in store.find(tmp_path / "run")] == [3]
    assert status(tmp_path / "run")["state"] == "failed"
    assert "ZeroDivisionError" in status(tmp_path / "run")["error"]
    assert ranks.launch(train, 1, [*args, "run.resume=auto"]) == [0]
    assert rows(tmp_path / "run") == rows(whole(1, *BARE))


def broken_while_writing(args: list[str]) -> int | str:
    save, broken = store.save, threading.Event()

    def fifth(job: Any) -> None:
        if job.state.step == 4:
            broken.set()
            raise ZeroDivisionError("not today")

    def held(*rest: Any, **more: Any) -> Path:
        assert broken.wait(WAIT_S)
        return save(*rest, **more)

    with patch.object(store, "save", held):
        return train(args, on_step=fifth)


def test_what_could_not_be_written_is_said_at_the_end(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run", *BARE, "checkpoint.every_steps=0")
    assert ranks.launch(broken_while_failing_to_write, 1, args) == ["1"]
    text = (tmp_path / "run/train.log").read_text()
    assert text.count("WARNING the last checkpoint is not saved: step_3.pt: No space left") == 1
    assert "ZeroDivisionError" in status(tmp_path / "run")["error"]


def broken_while_failing_to_write(args: list[str]) -> int | str:
    broken = threading.Event()

    def fifth(job: Any) -> None:
        if job.state.step == 4 and os.environ["RANK"] == "0":
            broken.set()
            raise ZeroDivisionError("not today")

    def full(*rest: Any, **more: Any) -> Path:
        assert broken.wait(WAIT_S)
        raise CheckpointError("step_3.pt: No space left on device")

    with patch.object(store, "save", full):
        return train(args, on_step=fifth)


def test_what_failed_is_written_again_as_it_was(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """Once, beside training: the weights of its own step, best and kept for good as was meant."""
    more = (
        "checkpoint.every_steps=0",
        "log.every_steps=1",
        "checkpoint.keep_every=1",
        "measure.every=0",
    )
    args = arguments(photos, tmp_path / "run", *more)
    written = ranks.launch(failing_once, 2, args)
    assert written == [[3, 3, 6, 9], []]
    assert ranks.launch(train, 2, [*args, f"run.dir={tmp_path / 'free'}"]) == [0, 0]
    ours, free = (store.find(tmp_path / name) for name in ("run", "free"))
    assert [(f.step, f.permanent) for f in ours] == [(f.step, f.permanent) for f in free]
    for mine, theirs in zip(ours, free, strict=True):
        left, right = (torch.load(found.path, weights_only=True) for found in (mine, theirs))
        assert_same_bits(left["model"], right["model"])
        assert left["best"] == right["best"]
    best = [
        json.loads((tmp_path / n / "checkpoints/best.json").read_text()) for n in ("run", "free")
    ]
    assert best[0]["step"] == best[1]["step"]
    text = (tmp_path / "run/train.log").read_text()
    assert text.count("checkpoint at step 3 not saved (1 of 10 failures") == 1


def failing_once(args: list[str]) -> list[int]:
    """The steps of which a checkpoint was begun; that of step 3 fails, then takes two steps."""
    save, reached = store.save, threading.Event()
    begun: list[int] = []

    def watched(job: Any) -> None:
        if job.state.step == 3:
            writes.finish()
        if job.state.step == 5:
            reached.set()

    def watched_save(*rest: Any, **more: Any) -> Path:
        begun.append(more["step"])
        if len(begun) == 1:
            raise CheckpointError("step_3.pt: Stale file handle")
        assert reached.wait(WAIT_S), "training waits for the checkpoint"
        return save(*rest, **more)

    with Writes() as writes, patch.object(store, "save", watched_save):
        assert train(args, on_step=watched) == 0
    return begun


def test_a_stop_comes_after_what_is_being_written(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run", *BARE, "checkpoint.every_steps=0")
    assert ranks.launch(stopped_while_writing, 2, args) == [0, 0]
    assert status(tmp_path / "run")["state"] == "preempted"
    steps = [found.step for found in store.find(tmp_path / "run")]
    assert steps == [status(tmp_path / "run")["step"], 3]
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    assert rows(tmp_path / "run") == rows(whole(2, *BARE))


def stopped_while_writing(args: list[str]) -> int | str:
    save, asked = store.save, threading.Event()

    def fifth(job: Any) -> None:
        if job.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            asked.set()

    def held(*rest: Any, **more: Any) -> Path:
        assert asked.wait(WAIT_S)
        return save(*rest, **more)

    with patch.object(store, "save", held):
        return train(args, on_step=fifth)


def test_resumed_where_not_every_epoch_is_saved(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    more = (*BARE, "checkpoint.every=2", "checkpoint.every_steps=0", "checkpoint.best=null")
    args = arguments(photos, tmp_path / "run", *more, "optim.epochs=4")
    for death, saved in ((5, []), (11, [6])):
        assert ranks.launch(train, 2, [*args, "run.resume=auto"], death) == ["killed"] * 2
        assert [found.step for found in store.find(tmp_path / "run")] == saved
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    assert ranks.launch(train, 2, [*args, f"run.dir={tmp_path / 'whole'}"]) == [0, 0]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_state_that_cannot_be_loaded_ends_the_run(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run", *BARE, "checkpoint.every_steps=0")
    assert ranks.launch(with_unsafe_state, 2, args) == [1, 1]
    assert "cannot be loaded safely" in status(tmp_path / "run")["error"]
    assert store.find(tmp_path / "run") == []


def with_unsafe_state(args: list[str]) -> int | str:
    from ddp_ssl.methods.adadim import AdaDim

    with patch.object(AdaDim, "get_extra_state", lambda self: {"alpha": 0.0, "history": [Path()]}):
        return train(args)


def test_epochs_between_checkpoints(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """Every second epoch, the last, and those kept for good."""
    more = ["checkpoint.every=2", "checkpoint.every_steps=0", "checkpoint.keep=9", "optim.epochs=7"]
    more = [*more, "method.alpha_every=100", "measure.every=0"]
    unbest = ("eval.every=0", "checkpoint.keep_every=5", "checkpoint.best=null")
    args = arguments(photos, tmp_path / "run", *more, *unbest)
    assert ranks.launch(train, 1, args) == [0]
    assert [found.step for found in store.find(tmp_path / "run")] == [21, 18, 15, 12, 6]
    args = arguments(photos, tmp_path / "best", *more)
    assert ranks.launch(train, 1, args) == [0]
    knn = {
        row["step"]: row["eval/knn_top1"]
        for row in rows(tmp_path / "best")
        if "eval/knn_top1" in row
    }
    best = store.CheckpointInfo.read(tmp_path / "best/checkpoints/best.json").step
    assert knn[best] == max(value for step, value in knn.items() if step)
