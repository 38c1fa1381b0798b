"""Whole runs on the same images in folders and in each container: the same numbers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_ssl.config import ConfigError, Data
from ddp_ssl.data.datasets import registry
from ddp_ssl.run import configure
from ddp_ssl.run.identity import check_identity, identity
from tests.data.images import pack
from tests.data.tables import as_parquet
from tests.data.tars import as_tars
from tests.ranks import Ranks
from tests.runs import BARE, Whole, arguments, assert_same_bits, complaint, rows, status, train

Kinds = dict[str, list[str]]


@pytest.fixture(scope="module")
def kinds(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """What `data.name=folder data.root=photos` is, in each container."""
    root = tmp_path_factory.mktemp("kinds")
    images = registry.definition_of(Data(root=str(photos))).load(Data(root=str(photos)))
    lines = [
        f"{images.train.name(i).decode()},{images.class_names[label]}\n"
        for i, label in enumerate(images.train.labels)
    ]
    (root / "list.csv").write_text("".join(lines))
    assert pack(photos, root / "shards") == 0
    return {
        "folder": [f"data.root={photos}"],
        "list": ["data.name=list", f"data.root={photos}", f"data.files={root / 'list.csv'}"],
        "shards": [f"data.root={root / 'shards'}"],
        "parquet": ["data.name=parquet", f"data.root={as_parquet(photos, root / 'parquet')}"],
        "without names": [f"data.root={as_parquet(photos, root / 'unnamed', named=False)}"],
        "webdataset": ["data.name=webdataset", f"data.root={as_tars(photos, root / 'tars')}"],
    }


def last(folder: Path) -> dict[str, Any]:
    path = max((folder / "checkpoints").glob("step_*.pt"))
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def assert_same_run(mine: Path, other: Path) -> None:
    """The same rows and checkpoints; a folder has no checksums in its identity."""
    assert rows(mine) == rows(other)
    ours, theirs = last(mine), last(other)
    for saved in (ours, theirs):
        saved["identity"] = {
            key: value for key, value in saved["identity"].items() if " contents in " not in key
        }
    for key in ("identity", "model", "optimizer", "ranks", "bad_images", "best"):
        assert_same_bits(ours[key], theirs[key])


@pytest.mark.parametrize("kind", ["list", "shards", "parquet", "webdataset"])
def test_a_run_is_the_same_on_each(
    ranks: Ranks, whole: Whole, photos: Path, kinds: Kinds, tmp_path: Path, kind: str
) -> None:
    args = arguments(photos, tmp_path / "run", *kinds[kind])
    assert ranks.launch(train, 1, args) == [0]
    assert_same_run(tmp_path / "run", whole(1))
    contents = {key for key in last(tmp_path / "run")["identity"] if " contents in " in key}
    names = () if kind == "list" else ("train", "validation")
    assert contents == {f"{name} contents in {kind}" for name in names}


def test_a_run_goes_on_in_another_container(
    ranks: Ranks, whole: Whole, photos: Path, kinds: Kinds, tmp_path: Path
) -> None:
    """Through all of them, with two processes: to the last bit."""
    run, how = tmp_path / "run", (*BARE, "checkpoint.every_steps=1", "run.resume=auto")
    for kind in ("folder", "webdataset", "shards", "without names"):
        assert ranks.launch(soon_stopped, 2, arguments(photos, run, *kinds[kind], *how)) == [0, 0]
        assert status(run)["state"] == "preempted"
    assert ranks.launch(train, 2, arguments(photos, run, *kinds["list"], *how)) == [0, 0]
    assert_same_run(run, whole(2, *BARE))


def soon_stopped(args: list[str]) -> int | str:
    """One or two steps, after which the run is told to stop."""
    return train(args, on_step=lambda _: os.kill(os.getpid(), signal.SIGTERM))


def test_what_an_earlier_version_saved_of_a_list(kinds: Kinds, tmp_path: Path) -> None:
    now = identity(configure.load(["method.name=simclr", *kinds["list"]]).config)
    assert now["data.name"] == "folder"
    check_identity(now, now | {"data.name": "list"}, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.name: cifar10 in the checkpoint, folder now"):
        check_identity(now, now | {"data.name": "cifar10"}, tmp_path)


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
