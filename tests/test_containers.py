"""Whole runs on the same images in folders and in parquet files: the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.tables import as_parquet
from tests.ranks import Ranks
from tests.runs import Whole, arguments, assert_same_bits, complaint, rows, train


@pytest.fixture(scope="module")
def tables(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_parquet(photos, tmp_path_factory.mktemp("tables"))


def last(folder: Path) -> dict[str, Any]:
    path = max((folder / "checkpoints").glob("step_*.pt"))
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_on_parquet_files_is_the_run_on_folders(
    ranks: Ranks, whole: Whole, tables: Path, tmp_path: Path, size: int
) -> None:
    args = arguments(tables, tmp_path / "run", "data.name=parquet")
    assert ranks.launch(train, size, args) == [0] * size
    assert rows(tmp_path / "run") == rows(whole(size))
    mine, other = last(tmp_path / "run"), last(whole(size))
    contents = {key for key in mine["identity"] if " contents in " in key}
    assert contents == {f"{name} contents in parquet" for name in ("train", "validation")}
    for key in contents:
        del mine["identity"][key]  # a folder has no checksums
    for key in ("identity", "model", "optimizer", "ranks", "bad_images", "best"):
        assert_same_bits(mine[key], other[key])


def test_a_run_goes_on_in_another_container(
    ranks: Ranks, whole: Whole, photos: Path, tables: Path, tmp_path: Path
) -> None:
    """From a folder to parquet files without names, and back: to the last bit."""
    unnamed = as_parquet(photos, tmp_path / "unnamed", named=False)
    run = tmp_path / "run"
    assert ranks.launch(train, 2, arguments(photos, run), 3) != [0, 0]
    more = ("data.name=parquet", "run.resume=auto")
    assert ranks.launch(train, 2, arguments(unnamed, run, *more), 7) != [0, 0]
    assert ranks.launch(train, 2, arguments(photos, run, "run.resume=auto")) == [0, 0]
    assert rows(run) == rows(whole(2))


def test_other_labels_or_classes_are_another_experiment(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    """Images that have no names are known by their labels and classes alone."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    ranks.launch(train, 1, arguments(photos, run), 3)
    moved.mkdir()
    for i, folder in enumerate(sorted(photos.iterdir())):
        (moved / f"other{i}").symlink_to(folder)
    unnamed = as_parquet(moved, tmp_path / "unnamed", named=False)
    ((code, said),) = ranks.launch(complaint, 1, arguments(unnamed, run, "run.resume=auto"))
    assert code == 2
    assert "is another experiment: classes: " in said
