"""Whole runs and their data: views spread over processes, bad images, another world size."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ddp_ssl.data.loading.order import permutation
from tests.ranks import Ranks
from tests.runs import arguments, ids_of, rows, status, train, watch

FOUR = "data.views=[{count: 4, size: 16, recipe: sym}]"


@pytest.fixture(scope="module")
def sharded(ranks: Ranks, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sharded") / "run"
    args = arguments(photos, folder, FOUR, "data.view_shards=2")
    return folder, args, ranks.launch(watch, 4, args)


def test_a_view_group_sees_the_same_images_in_other_crops(sharded: Any) -> None:
    folder, _, results = sharded
    assert [code for code, _ in results] == [0] * 4
    order = [permutation(0, epoch, 43)[:36].reshape(3, 12).tolist() for epoch in range(3)]
    assert ids_of(results, 2) == [step for epoch in order for step in epoch]
    for step in range(9):
        parts = [seen[step] for _, seen in results]
        assert not set(parts[0][0]) & set(parts[2][0])
        views = [view for _, held in parts[:2] for view in held]
        assert len(views) == 4
        assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    losses = [row for row in rows(folder) if "train/loss" in row]
    assert len(losses) == 9
    assert 0 < losses[-1]["rep/alpha"] < 1
    assert all(row.get("run/bad_images", 0) == 0 for row in losses)


def test_a_view_sharded_run_resumes_exactly(ranks: Ranks, sharded: Any, tmp_path: Path) -> None:
    whole, args, _ = sharded
    folder = tmp_path / "run"
    args = [a if not a.startswith("run.dir=") else f"run.dir={folder}" for a in args]
    ranks.launch(train, 4, args, 5)
    assert ranks.launch(train, 4, [*args, "run.resume=auto"]) == [0] * 4
    assert rows(folder) == rows(whole)


def diverge(args: list[str]) -> int | str:
    """A run in which an odd rank sees another image at the fifth step."""
    from ddp_ssl.data.loading.loader import TrainLoader

    original = TrainLoader.__next__

    def changed(self: TrainLoader) -> Any:
        batch = original(self)
        if self.order.shard == 1 and self.augmentation.salt % 2 and self.step == 5:
            batch.ids[0] += 1
        return batch

    with patch.object(TrainLoader, "__next__", changed):
        return train(args)


def test_a_view_group_that_diverges_stops(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    args = arguments(photos, tmp_path / "run", FOUR, "data.view_shards=2")
    assert ranks.launch(diverge, 4, args) == [1] * 4
    assert "read different images up to step 6" in status(tmp_path / "run")["error"]
    steps = [p.stem for p in (tmp_path / "run" / "checkpoints").glob("step_*.pt")]
    assert sorted(steps)[-1].endswith("4")  # nothing was saved after it


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 3)])
def test_another_world_size_sees_each_image_once(
    ranks: Ranks, photos: Path, tmp_path: Path, before: int, after: int
) -> None:
    """Interrupted in the second epoch: both parts together are that epoch."""
    args = arguments(photos, tmp_path / "run")
    first = ranks.launch(watch, before, args, 5)
    second = ranks.launch(watch, after, [*args, "run.resume=auto"])
    assert [code for code, _ in second] == [0] * after
    assert len(ids_of(second)) == 5  # saved at step 4 of 9
    steps = ids_of(first)[:4] + ids_of(second)
    for epoch in range(3):
        seen = [i for step in steps[epoch * 3 : epoch * 3 + 3] for i in step]
        assert seen == permutation(0, epoch, 43)[:36].tolist()


def test_half_precision_images_train_and_are_measured(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    views = "data.views=[{count: 2, size: 64, recipe: sym}]"
    half = ("data.dtype=float16", "optim.precision=bf16", views, "data.val_size=16")
    args = arguments(photos, tmp_path / "run", *half)
    ((code, seen),) = ranks.launch(watch, 1, args)
    assert code == 0
    assert {view.dtype for _, views in seen for view in views} == {torch.float16}
    alphas = [row["rep/alpha"] for row in rows(tmp_path / "run") if "rep/alpha" in row]
    assert 0 < alphas[-1] < 1


# --- bad images ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoiled(ranks: Ranks, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on good files and the same on a copy of which three training files are bad."""
    root = tmp_path_factory.mktemp("spoiled")
    folders = {"good": root / "good", "bad": root / "bad"}
    for data in folders.values():
        shutil.copytree(photos, data)
    args = {
        kind: arguments(data, root / f"run-{kind}", "data.max_bad_fraction=0.1")
        for kind, data in folders.items()
    }
    good = ranks.launch(watch, 2, args["good"])
    from ddp_ssl.data.datasets import registry
    from ddp_ssl.run.configure import load

    split = registry.load(load(args["bad"]).config.data, 0).train
    hit = [int(permutation(0, epoch, 43)[place]) for epoch, place in ((0, 14), (1, 2), (1, 20))]
    for i, content in zip(hit, (b"", b"no image" * 99, None), strict=True):
        path = Path(split.where(i))
        path.write_bytes(path.read_bytes()[:-2] if content is None else content)
    return root, args, good, ranks.launch(watch, 2, args["bad"]), hit, split


def test_training_goes_on_beside_bad_images(spoiled: Any) -> None:
    root, _, good, bad, hit, split = spoiled
    assert [code for code, _ in bad] == [0, 0]
    replaced = 0
    for (_, ours), (_, theirs) in zip(bad, good, strict=True):
        for (ids, views), (ids_before, views_before) in zip(ours, theirs, strict=True):
            same = torch.tensor([i not in hit for i in ids_before])
            assert [a for a, s in zip(ids, same, strict=True) if s] == [
                b for b, s in zip(ids_before, same, strict=True) if s
            ]
            assert not set(ids) & set(hit)
            for a, b in zip(views, views_before, strict=True):
                assert torch.equal(a[same], b[same])
            replaced += int((~same).sum())
    assert replaced >= 3
    listed = (root / "run-bad" / "bad_images.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} == {split.where(i) for i in hit}
    assert len(listed) == 3
    counts = [r["run/bad_images"] for r in rows(root / "run-bad") if "run/bad_images" in r]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    assert not (root / "run-good" / "bad_images.txt").exists()
    assert {r["run/bad_images"] for r in rows(root / "run-good") if "run/bad_images" in r} == {0}


def test_resuming_beside_bad_images_is_exact(ranks: Ranks, spoiled: Any, tmp_path: Path) -> None:
    root, args, *_ = spoiled
    folder = tmp_path / "run"
    mine = [a if not a.startswith("run.dir=") else f"run.dir={folder}" for a in args["bad"]]
    ranks.launch(train, 2, mine, 5)
    assert ranks.launch(train, 2, [*mine, "run.resume=auto"]) == [0, 0]
    assert rows(folder) == rows(root / "run-bad")
    assert (folder / "bad_images.txt").read_text() == (
        root / "run-bad" / "bad_images.txt"
    ).read_text()


def test_too_many_bad_images_stop_the_run_and_lose_nothing(
    ranks: Ranks, spoiled: Any, tmp_path: Path
) -> None:
    _, args, *_ = spoiled
    folder = tmp_path / "run"
    mine = [a if not a.startswith("run.dir=") else f"run.dir={folder}" for a in args["bad"]]
    strict = [*mine, "data.max_bad_fraction=0.03", "checkpoint.every_steps=0"]
    assert ranks.launch(train, 2, strict) == [1, 1]
    state = status(folder)
    assert state["state"] == "failed"
    assert state["error"].startswith("data.max_bad_fraction: 3 of 48 images cannot be used")
    assert "\n" not in state["error"]
    assert "ddp-ssl check-data" in state["error"]
    steps = [r["step"] for r in rows(folder) if "train/loss" in r]
    assert ranks.launch(train, 2, [*mine, "run.resume=auto"]) == [0, 0]
    after = [r["step"] for r in rows(folder) if "train/loss" in r]
    assert after == list(range(1, 10))  # none trained twice: it was saved where it stopped
    assert steps == after[: len(steps)]


def vanish(args: list[str], data: str, at: int) -> int | str:
    """A run whose images vanish when a step begins."""

    def lose(job: Any) -> None:
        if job.state.step == at:
            with contextlib.suppress(OSError):
                Path(data).rename(f"{data}-gone")

    return train(args, on_step=lose)


MEASURED = ("checkpoint.every_steps=0", "log.every_steps=100")
UNMEASURED = (
    *MEASURED,
    "method.alpha_every=9",
    "eval.every=0",
    "measure.every=0",
    "optim.epochs=6",
)


@pytest.mark.parametrize("more", [MEASURED, UNMEASURED])
def test_data_that_vanish_cost_nothing_and_can_come_back(
    ranks: Ranks, photos: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Noticed where alpha is measured, or some steps before there would be no batch."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(photos, data)
    args = arguments(data, folder, *more)
    assert ranks.launch(vanish, 2, args, str(data), 4) == [1, 1]
    error = status(folder)["error"]
    assert "none can be used" in error or "images cannot be used" in error
    assert "\n" not in error
    assert status(folder)["retry"] is False
    before = [r["step"] for r in rows(folder) if "train/loss" in r]
    assert len(before) >= 6
    Path(f"{data}-gone").rename(data)
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    whole = [a if not a.startswith("run.dir=") else f"run.dir={tmp_path / 'whole'}" for a in args]
    assert ranks.launch(train, 2, whole) == [0, 0]
    steps = [
        [row["train/loss"] for row in rows(place) if "train/loss" in row]
        for place in (folder, tmp_path / "whole")
    ]
    assert steps[0] == steps[1]


def test_bad_validation_images_are_said_after_the_epoch_counts(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    """All images are bad: no figures, one clear line, and nothing is measured twice once mended."""
    from ddp_ssl.data.datasets import registry
    from ddp_ssl.run.configure import load

    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(photos, data)
    args = arguments(data, folder)
    val = registry.load(load(args).config.data, 0).val
    assert val is not None
    spoiled = [Path(val.where(i)) for i in range(len(val))]
    before = [path.read_bytes() for path in spoiled]
    for path in spoiled:
        path.write_bytes(b"")
    assert ranks.launch(train, 2, args) == [1, 1]
    assert status(folder)["error"].startswith("data.max_bad_fraction: 5 of 48 images")
    for path, content in zip(spoiled, before, strict=True):
        path.write_bytes(content)
    shutil.rmtree(folder)
    assert ranks.launch(vanish, 2, args, str(spoiled[0]), 1) == [1, 1]
    Path(f"{spoiled[0]}-gone").rename(spoiled[0])
    assert ranks.launch(train, 2, [*args, "run.resume=auto"]) == [0, 0]
    measured = [r["step"] for r in rows(folder) if "rep/effective_rank_z_train" in r]
    assert measured == [3, 6, 9]
