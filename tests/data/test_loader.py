"""The loaders end to end: coverage, determinism, resuming to the bit, view groups, bad files."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ddp_ssl.config.views import CentralCrop, View
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading import dali
from ddp_ssl.data.loading.loader import _batch
from ddp_ssl.data.loading.order import permutation
from ddp_ssl.run.configure import load
from tests.data.images import (
    array_of,
    eval_of,
    folder_of,
    loader_of,
    picture,
    same,
    through_a_file,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """20 JPEGs: three steps of six an epoch, and two left over."""
    return folder_of(tmp_path_factory.mktemp("files"), 20)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "array"])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_epoch_covers_the_images(files: Split, kind: str, shards: int) -> None:
    split = files if kind == "files" else array_of(20)
    loaders = [loader_of(split, shard=s, num_shards=shards) for s in range(shards)]
    assert loaders[0].steps_per_epoch == 3
    for epoch in range(2):
        ids = []
        for _ in range(3):
            for loader in loaders:
                batch = next(loader)
                ids += batch.ids.tolist()
                assert batch.labels.tolist() == split.labels[batch.ids.numpy()].tolist()
        assert ids == permutation(3, epoch, 20)[:18].tolist()


def test_a_batch(files: Split) -> None:
    batch = next(loader_of(files))
    large, small = batch.views
    assert (large.shape, small.shape) == ((6, 3, 16, 16), (6, 3, 8, 8))
    for view in batch.views:
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert (batch.ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)


def test_half_precision_is_the_same_rounded(files: Split) -> None:
    batch, half = next(loader_of(files)), next(loader_of(files, half=True))
    for a, b in zip(batch.views, half.views, strict=True):
        assert b.dtype == torch.float16
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert b._base is not None  # a view of what DALI made, no copy
        assert (a - b.float()).abs().max() <= 2**-11  # half a unit in the last place below 1


def test_unlabelled_images(files: Split) -> None:
    split = Split(np.full(20, -1), files.root, files.names, files.spans)
    assert next(loader_of(split)).labels.tolist() == [-1] * 6


@pytest.mark.parametrize("kind", ["files", "array"])
def test_a_kept_batch_stays_as_it_was(files: Split, kind: str) -> None:
    loader = loader_of(files if kind == "files" else array_of(20))
    kept = next(loader)
    copy = Batch([view.clone() for view in kept.views], kept.ids.clone(), kept.labels.clone())
    for _ in range(8):
        next(loader)
    assert same(kept, copy)
    assert torch.equal(kept.labels, copy.labels)


@pytest.mark.parametrize("changes", [{"threads": 2}, {"prefetch": 1}, {"prefetch": 4}])
def test_threads_and_prefetch_change_nothing(files: Split, changes: dict[str, int]) -> None:
    a, b = loader_of(files), loader_of(files, **changes)
    assert all(same(next(a), next(b)) for _ in range(5))


def test_seed_salt_and_start_change_the_augmentations(files: Split) -> None:
    base = next(loader_of(files))
    assert same(base, next(loader_of(files)))
    other = next(loader_of(files, salt=1))
    assert torch.equal(other.ids, base.ids)
    assert not same(base, other)
    assert next(loader_of(files, seed=4)).ids.tolist() != base.ids.tolist()
    late, loader = loader_of(files), loader_of(files)
    late.load_state({}, 4)
    assert next(late).ids.tolist() == [next(loader).ids.tolist() for _ in range(5)][4]


def test_a_view_group_reads_the_same_images_and_makes_other_views(files: Split) -> None:
    """Two ranks of a group, each with its salt and half of four views of one recipe."""
    view = View(size=16, solarize_p=0.3)
    group = [
        loader_of(files, [view, view], salt=salt, view_ids=ids, num_shards=2, shard=1)
        for salt, ids in ((2, [0, 2]), (3, [1, 3]))
    ]
    for _ in range(4):
        a, b = (next(loader) for loader in group)
        assert torch.equal(a.ids, b.ids)
        views = [*a.views, *b.views]
        assert not any(torch.equal(x, y) for i, x in enumerate(views) for y in views[:i])


def test_view_ids_name_the_random_streams(files: Split) -> None:
    view = View(size=16)
    both = next(loader_of(files, [view, view]))
    second = next(loader_of(files, [view], view_ids=[1]))
    assert torch.equal(both.views[1], second.views[0])


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "seq", "exact"])
def test_resuming_is_exact(files: Split, mode: str) -> None:
    """At the start, within an epoch, at its last step, after it, in a later one."""
    going, states, batches = loader_of(files, color_jitter=mode), [], []
    for _ in range(12):
        states.append(through_a_file(going.state()))
        batches.append(next(going))
    for step in (0, 1, 2, 3, 7):
        resumed = loader_of(files, color_jitter=mode, threads=2, prefetch=3)
        assert resumed.load_state(states[step], step) is None
        again = through_a_file(resumed.state())  # before anything is built
        third = loader_of(files, color_jitter=mode)
        assert third.load_state(again, step) is None
        for batch in batches[step : step + 5]:
            assert same(batch, next(resumed))
            assert same(batch, next(third))


def test_taking_a_state_changes_nothing(files: Split) -> None:
    a, b = loader_of(files), loader_of(files)
    for _ in range(5):
        b.state()
        assert same(next(a), next(b))


def test_another_number_of_shards_keeps_the_order(files: Split) -> None:
    before = loader_of(files)
    for _ in range(4):
        next(before)
    state = through_a_file(before.state())
    after = [loader_of(files, shard=s, num_shards=3, salt=s) for s in range(3)]
    warnings = [loader.load_state(state, 4) for loader in after]
    assert warnings[0] is not None
    assert "batch 6 -> 2, num_shards 1 -> 3" in warnings[0]
    assert "continues exactly at step 4" in warnings[0]
    assert "\n" not in warnings[0]
    for _ in range(3):
        gathered = torch.cat([next(loader).ids for loader in after])
        assert gathered.tolist() == next(before).ids.tolist()
    # From here on a resume is exact again, from the seed that the restart derived.
    resumed = loader_of(files, shard=0, num_shards=3, salt=0)
    assert resumed.load_state(through_a_file(after[0].state()), 7) is None
    assert all(same(next(resumed), next(after[0])) for _ in range(4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"salt": 5}, "salt 0 -> 5"),
        ({"seed": 5}, "seed 3 -> 5"),
        ({"color_jitter": "fast"}, "color_jitter seq -> fast"),
        ({"mean": (0, 0, 0)}, "normalisation"),
        ({"view_ids": [1, 0]}, "view_ids"),
        ({"views": [View(size=16)]}, "views"),
    ],
)
def test_what_differs_is_named(files: Split, changes: dict[str, Any], named: str) -> None:
    state = loader_of(files).state()
    warning = loader_of(files, **changes).load_state(state, 0)
    assert warning is not None
    assert f"({named}" in warning


def test_other_data_steps_and_versions_are_named(
    files: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = loader_of(files).state()
    part = loader_of(files.subset(np.arange(19))).load_state(state, 0)
    assert part is not None
    assert "(data)" in part
    step = loader_of(files).load_state(state, 2)
    assert step is not None
    assert "(step 0 -> 2)" in step
    monkeypatch.setattr("ddp_ssl.data.loading.dali.VERSION", "9.9")
    version = loader_of(files).load_state(state, 0)
    assert version is not None
    assert "dali" in version


def test_a_restart_draws_anew() -> None:
    """All images are the same one, so equal draws would give equal views."""
    image = picture(0, 20, 20)
    loader = loader_of(Split.of_array(np.stack([image] * 20)))
    state = loader.state()
    first = next(loader)
    assert loader.load_state(state, 18) is not None  # another step: a restart
    assert not torch.equal(next(loader).views[0], first.views[0])
    assert loader.load_state(state, 0) is None
    assert torch.equal(next(loader).views[0], first.views[0])


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "array"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 12, 19])
def test_evaluation_covers_and_pads(files: Split, kind: str, shards: int, count: int) -> None:
    split = files if kind == "files" else array_of(20)
    ids = np.random.default_rng(0).permutation(20)[:count]
    seen, lengths = [], []
    for shard in range(shards):
        loader = eval_of(split, ids, shard, shards)
        batches = list(loader)
        lengths.append(len(batches))
        assert len(loader) == len(batches)
        for batch in batches:
            assert batch.views[0].shape == (4, 3, 16, 16)
            assert batch.views[0].is_contiguous(memory_format=torch.channels_last)
            padding = batch.ids < 0
            assert torch.equal(batch.labels[~padding], batch.ids[~padding])  # labels are ids here
            assert set(batch.labels[padding].tolist()) <= {-1}
        own = torch.cat([batch.ids for batch in batches])
        assert own[own >= 0].tolist() == ids[shard::shards].tolist()
        seen += own[own >= 0].tolist()
    assert sorted(seen) == sorted(ids.tolist())
    assert len(set(lengths)) == 1


def test_evaluation_has_no_chance_and_can_be_repeated(files: Split) -> None:
    loader = eval_of(files, np.arange(10))
    first, second = list(loader), list(loader)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    other = list(eval_of(files, np.arange(10), batch_size=10))
    assert torch.equal(torch.cat([b.views[0] for b in first])[:10], other[0].views[0])


def test_no_images_are_no_batches(files: Split) -> None:
    assert list(eval_of(files, np.arange(0))) == []


def test_what_an_evaluation_sees() -> None:
    def crop(name: str, *keys: str) -> CentralCrop:
        return load([f"data.name={name}", *keys]).config.data.central_crop

    def at(size: int) -> str:
        return f"data.views=[{{size: {size}}}]"

    sizes = [crop("imagenet", at(size)).resize for size in (32, 63, 64, 96, 224)]
    assert sizes == [32, 63, 73, 110, 256]
    # solo-learn's STL-10 is `Resize((96, 96))`, CIFAR's nothing.
    assert crop("stl10", at(96)) == (96, 96, "bicubic")
    assert crop("tiny_imagenet", at(64)) == (64, 64, "bicubic")
    assert crop("stl10", at(96), "data.val_size=64", "data.val_resize=70") == (70, 64, "bicubic")
    assert crop("imagenet", at(224), "data.val_interpolation=bilinear") == (256, 224, "bilinear")
    with pytest.raises(ValueError, match=r"^data.val_resize: 12 is less than .* 16; accepted: 16"):
        eval_of(array_of(3), np.arange(3), crop=CentralCrop(12, 16))


def test_ids_and_labels_for_a_gpu_are_pinned(files: Split) -> None:
    """The views are there already. Ids stay on the host; DeepCluster v2 copies them."""
    pinned: list[torch.Tensor] = []
    out = {"view0": torch.zeros(3, 4, 4, 3), "ids": torch.tensor([[2], [5], [-1]])}
    with (
        patch.object(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x),
        patch.object(torch.Tensor, "to", lambda x, device, non_blocking: x),
    ):
        batch = _batch(out, 1, files, torch.device("cuda", 0))
    assert [x.tolist() for x in pinned] == [batch.ids.tolist(), batch.labels.tolist()]
    assert batch.labels.tolist() == [files.labels[2], files.labels[5], -1]


# --- the end of a pipeline -----------------------------------------------------------------------


def test_a_closed_loader_frees_its_pipeline_at_once(
    files: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that on a GPU one pipeline at a time holds memory beside training's."""
    made: list[weakref.ref[Any]] = []
    iterator = dali._iterator

    def noted(pipe: Any, views: int) -> Any:
        made.append(weakref.ref(pipe))
        return iterator(pipe, views)

    monkeypatch.setattr(dali, "_iterator", noted)
    gc.disable()  # which would free a cycle later, at a moment of its own
    try:
        training = loader_of(files)
        next(training)
        training.close()
        for _ in eval_of(files, np.arange(20)):
            assert made[-1]() is not None
        for _ in eval_of(files, np.arange(20)):
            break
        assert [pipe() for pipe in made] == [None] * 3
    finally:
        gc.enable()
