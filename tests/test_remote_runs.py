"""Whole runs on images in an object store, which this process serves."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddp_ssl.data.datasets import remote
from ddp_ssl.data.loading import reader
from ddp_ssl.training import epochs
from tests.data.images import pack
from tests.ranks import Ranks
from tests.runs import Whole, arguments, rows, status, train
from tests.store import Store, serving


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The photos in shards."""
    root = tmp_path_factory.mktemp("store")
    assert pack(photos, root / "bucket/shards") == 0
    with serving(root) as made:
        yield made


def test_a_run_goes_on_from_a_folder_to_a_store_and_a_part_of_a_copy(
    ranks: Ranks, whole: Whole, store: Store, photos: Path, tmp_path: Path
) -> None:
    run, root = tmp_path / "run", f"data.root={store.url}/bucket/shards"
    part = (f"data.stage={tmp_path / 'local'}", "data.stage_gb=25e-6")
    assert ranks.launch(train, 2, arguments(photos, run), 4) != [0, 0]
    args = arguments(photos, run, root, "run.resume=auto", *part)
    assert ranks.launch(train, 2, args) == [0, 0]
    assert rows(run) == rows(whole(2))
    assert len(list((tmp_path / "local").rglob("train-*.tar"))) == 1


def test_a_store_that_fails_stops_the_run_with_a_checkpoint(
    whole: Whole, store: Store, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """In a step, then in a validation; no other image takes the place of one it did not give.

    A run that is asked to stop meanwhile does not wait for the store.
    """
    monkeypatch.setattr(remote, "PATIENCE_S", 100.0)
    monkeypatch.setattr(remote, "ASKED_S", 0.2)
    run = tmp_path / "run"
    args = arguments(photos, run, f"data.root={store.url}/bucket/shards", "run.resume=auto")

    validate = epochs.evaluate

    def dies_at(step: int) -> Callable[[Any], None]:
        return lambda job: store.die() if job.state.step == step else None

    def dying(job: Any, *rest: Any) -> Any:
        dies_at(9)(job)
        return validate(job, *rest)

    def newest_after(ended: int | str) -> int:
        assert (str(ended), status(run)["state"]) == ("1", "failed")
        said = r"data\.root: http://\S+/(train|val)-\d+\.tar: no answer for \d s \(.*"
        assert re.fullmatch(said, status(run)["error"])
        assert status(run)["retry"] is True
        assert not (run / "bad_images.txt").exists()
        store.live()
        return max(int(path.stem[5:13]) for path in (run / "checkpoints").glob("step_*.pt"))

    def dies_and_is_stopped(job: Any) -> None:
        if job.state.step == 3:
            store.die()
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with monkeypatch.context() as patch:
        patch.setattr(reader, "DEPTH", 0)  # or all images of the epoch are read ahead
        assert train([*args, "data.read_threads=1"], on_step=dies_and_is_stopped) == 0
    assert status(run)["state"] == "preempted"
    assert "trying again" not in caplog.text  # as after 5 of 100 seconds
    store.live()
    monkeypatch.setattr(remote, "PATIENCE_S", 0.2)
    assert newest_after(train(args, on_step=dies_at(6))) > 6
    with monkeypatch.context() as patch:
        patch.setattr(epochs, "evaluate", dying)
        assert newest_after(train(args)) == 9
    assert train(args) == 0
    assert rows(run) == rows(whole(1))
