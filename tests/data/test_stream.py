"""Shards read in sequence by DALI: coverage, view groups, resuming, and what the stream refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_ssl.commands import pack_shards
from ddp_ssl.config import ConfigError, Data
from ddp_ssl.config.views import View
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.loader import StreamLoader
from tests.data.images import grouped_settings, loader_of, through_a_file, write
from tests.helpers import config_of
from tests.ranks import Ranks
from tests.runs import arguments, ids_of, rows, train, watch

IMAGES = 36


def pack(root: Path, out: Path, *more: str) -> Path:
    options = ["--out", str(out), "--shard-size", "15000", "--workers", "2"]
    assert pack_shards.main([*options, "data.name=folder", f"data.root={root}", *more]) == 0
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for i in range(IMAGES + 6):
        split = "train" if i < IMAGES else "val"
        write(root / split / f"c{i % 3}" / f"{i:02d}.{('jpg', 'png', 'JPEG')[i % 3]}", i)
    return root


@pytest.fixture(scope="module")
def packed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(files, tmp_path_factory.mktemp("packed") / "out")


def split_of(root: Path) -> Split:
    return registry.load(Data(name="folder", root=str(root)), 0).train


def stream_of(root: Path, **changes: Any) -> StreamLoader:
    split = split_of(root)
    assert split.shards is not None
    views, shuffle = changes.pop("views", [View(size=16), View(size=8)]), changes.pop("shuffle", 8)
    grouped = grouped_settings(split, views, changes)
    return StreamLoader(split, *grouped, **split.shards.stream(), shuffle=shuffle, **changes)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pass_covers_the_images_with_their_labels(packed: Path, shards: int) -> None:
    loaders = [stream_of(packed, shard=s, num_shards=shards) for s in range(shards)]
    split, passes = split_of(packed), []
    assert loaders[0].steps_per_epoch == 6
    for _ in range(2):
        batches = [next(loader) for _ in range(6) for loader in loaders]
        ids = torch.cat([batch.ids for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        assert labels.tolist() == split.labels[ids.numpy()].tolist()
        assert len(set(split.labels.tolist())) == 3
        passes.append(ids.tolist())
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(IMAGES))
    assert passes[0] != passes[1]
    assert passes[0] != sorted(passes[0])


def test_the_images_are_those_of_their_ids(packed: Path) -> None:
    still = View(size=8, scale=(1, 1), ratio=(0.1, 10), jitter_p=0, gray_p=0, blur_p=0, flip_p=0)
    mean = {}
    ours, theirs = stream_of(packed, views=[still]), loader_of(split_of(packed), [still])
    for _ in range(6):
        for loader, sign in ((ours, 1.0), (theirs, -1.0)):
            batch = next(loader)
            for i, view in zip(batch.ids.tolist(), batch.views[0], strict=True):
                mean[i] = mean.get(i, 0) + sign * view
    assert len(mean) == IMAGES
    assert all(float(difference.abs().max()) < 1e-6 for difference in mean.values())


def test_a_view_group_reads_the_same_stream(packed: Path) -> None:
    view = View(size=16)
    group = [
        stream_of(packed, views=[view], view_ids=[k], shard=1, num_shards=2, salt=2 + k)
        for k in (0, 1)
    ]
    for _ in range(8):
        a, b = (next(loader) for loader in group)
        assert torch.equal(a.ids, b.ids)
        assert not torch.equal(a.views[0], b.views[0])


@pytest.mark.parametrize("step", [0, 1, 5, 6, 8])
def test_resuming_is_exact(packed: Path, step: int) -> None:
    going = stream_of(packed)
    for _ in range(step):
        next(going)
    resumed = stream_of(packed, prefetch=3, threads=2)
    assert resumed.load_state(through_a_file(going.state()), step) is None
    for _ in range(7):
        a, b = next(going), next(resumed)
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_another_number_of_processes_starts_the_stream_anew(packed: Path) -> None:
    before = stream_of(packed)
    next(before)
    warning = stream_of(packed, num_shards=2).load_state(before.state(), 1)
    assert warning is not None
    assert "num_shards 1 -> 2" in warning
    assert "the stream starts anew at step 1" in warning


def test_a_bad_image_is_said_in_one_line(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files, tmp_path / "files")
    (tmp_path / "files" / "train" / "c0" / "00.jpg").write_bytes(b"no image" * 100)
    loader = stream_of(pack(tmp_path / "files", tmp_path / "out"))
    with pytest.raises(RuntimeError, match="cannot replace a bad image") as caught:
        _ = [next(loader) for _ in range(6)]
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="cannot replace a bad image"):
        next(loader)


def refused(root: Path, **changes: Any) -> str:
    with pytest.raises(ValueError, match=r"^data\.") as caught:
        registry.load(Data(name="folder", root=str(root), **changes), 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_stream_cannot_do_is_refused(packed: Path, files: Path, tmp_path: Path) -> None:
    assert "holds no shards.json" in refused(files, reader="streamed")
    assert "holds no shards.json" in refused(files, stage=str(tmp_path))
    assert "data.fraction: a stream gives all" in refused(packed, reader="streamed", fraction=0.5)
    listed = tmp_path / "bad.txt"
    listed.write_text("")
    assert "data.skip: a stream gives all" in refused(packed, reader="streamed", skip=str(listed))
    assert "only data.reader=streamed" in refused(packed, url="s3://bucket/a")
    streamed = {"reader": "streamed", "url": "bucket/a"}
    assert "accepted: s3://BUCKET/FOLDER" in refused(packed, **streamed)
    streamed = {"reader": "streamed", "url": "s3://bucket/a", "stage": str(tmp_path)}
    assert "data.stage copies from data.root" in refused(packed, **streamed)
    flat = pack(files / "train", tmp_path / "flat")
    assert "no validation images of its own" in refused(flat, reader="streamed")
    with pytest.raises(ValueError, match="holds shards of folder, not of imagenet"):
        registry.load(Data(name="imagenet", root=str(packed)), 0)
    with pytest.raises(ConfigError, match=r"^eval.knn: .*eval.knn=false is accepted"):
        config_of("data.url=s3://bucket/a", "data.reader=streamed")


def test_index_files_that_are_missing_are_named(packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    (copy / "train-00000.idx").unlink()
    with pytest.raises(ValueError, match=r"train-00000\.idx is missing"):
        stream_of(copy)


# --- whole runs ----------------------------------------------------------------------------------


def test_a_run_on_shards_is_the_run_on_files(
    ranks: Ranks, files: Path, packed: Path, tmp_path: Path
) -> None:
    """Read by offset, the same to the bit; begun on files, it goes on with shards, staged ones."""
    assert ranks.launch(train, 2, arguments(files, tmp_path / "files")) == [0, 0]
    assert ranks.launch(train, 2, arguments(packed, tmp_path / "shards")) == [0, 0]
    assert rows(tmp_path / "shards") == rows(tmp_path / "files")
    ranks.launch(train, 2, arguments(files, tmp_path / "both"), 5)
    stage = (f"data.stage={tmp_path / 'local'}", "run.resume=auto")
    assert ranks.launch(train, 2, arguments(packed, tmp_path / "both", *stage)) == [0, 0]
    assert rows(tmp_path / "both") == rows(tmp_path / "files")
    assert len(list((tmp_path / "local").iterdir())) == 1


def test_a_streamed_run_resumes_exactly(ranks: Ranks, packed: Path, tmp_path: Path) -> None:
    four = "data.views=[{count: 4, size: 16, recipe: sym}]"
    more = ("data.reader=streamed", "data.view_shards=2", four)
    whole = ranks.launch(watch, 2, arguments(packed, tmp_path / "whole", *more))
    assert [code for code, _ in whole] == [0, 0]
    seen = ids_of(whole, 2)
    assert sorted(i for step in seen[:3] for i in step) == sorted(range(IMAGES))
    cut = arguments(packed, tmp_path / "cut", *more)
    ranks.launch(train, 2, cut, 5)
    assert ranks.launch(train, 2, [*cut, "run.resume=auto"]) == [0, 0]
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
