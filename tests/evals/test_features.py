"""Features: patches averaged, kept on disk, the same at any number of processes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.evals import features as module
from ddp_ssl.evals.features import Block, gather_rows
from tests.evals.extraction import (
    CPU,
    FLIPPED,
    RANDOM,
    Network,
    extractor_of,
    settings_of,
    split_of,
)
from tests.ranks import Ranks

ALONE = World(0, 1, 0, 1, CPU)


def pixels(split: Split) -> Tensor:
    assert split.images is not None
    return (torch.from_numpy(split.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def test_patches_are_averaged_as_by_hand() -> None:
    """Whole images, so that a patch is the image or, here always, its mirror image."""
    split, network = split_of(40), Network()
    block = extractor_of(settings_of(FLIPPED), ALONE).features(split, patches=3)
    x = pixels(split)
    with torch.no_grad():
        expected = (network(x) + 2 * network(x.flip(3))) / 3
        clean = network(x)
    assert torch.allclose(block.features, expected, atol=1e-4)
    assert not torch.allclose(block.features, clean, atol=1e-2)
    assert block.labels.tolist() == split.labels.tolist()
    assert block.ids.tolist() == list(range(40))
    one = extractor_of(settings_of(FLIPPED), ALONE).features(split, patches=1)
    assert torch.allclose(one.features, clean, atol=1e-4)


def test_patches_are_random_and_follow_the_seed() -> None:
    split = split_of(9)
    same, again, other = (
        extractor_of(settings_of(RANDOM, seed=seed), ALONE).features(split, patches=2).features
        for seed in (0, 0, 1)
    )
    assert torch.equal(same, again)
    assert not torch.allclose(same, other, atol=1e-3)


def extracted(world: World, patches: int, chunk: int) -> tuple[Block, Block]:
    """The block of this process, and the blocks of all."""
    module.CHUNKS = (chunk, chunk)
    block = extractor_of(settings_of(RANDOM), world).features(split_of(50), patches)
    comm = comm_of(world)
    return block, Block(*(gather_rows(x, comm, CPU) for x in vars(block).values()))


@pytest.mark.parametrize("patches", [1, 3])
def test_any_number_of_processes_gives_the_same(ranks: Ranks, patches: int) -> None:
    """Three processes share seven chunks of eight images, the last of two; four share one."""
    ((expected, _),) = ranks.run(extracted, 1, patches, 8)
    parts = ranks.run(extracted, 3, patches, 8)
    assert [len(part) for part, _ in parts] == [16, 16, 18]
    for _, whole in parts:
        assert torch.equal(whole.ids, expected.ids)
        assert torch.equal(whole.labels, expected.labels)
        assert torch.allclose(whole.features, expected.features, atol=1e-6)
    assert [len(part) for part, _ in ranks.run(extracted, 4, 1, 64)] == [0, 0, 0, 50]


def kept(world: World, folder: Path) -> tuple[Tensor, list[str]]:
    """All features, and the lines that were told."""
    module.CHUNKS = (8, 8)
    said: list[str] = []
    extractor = extractor_of(
        settings_of(RANDOM, cache_mb=0), world, digest="weights", cache=folder, tell=said.append
    )
    block = extractor.features(split_of(50), 2)
    return gather_rows(block.features, comm_of(world), CPU), said


def test_features_on_disk_serve_any_number_of_processes(ranks: Ranks, tmp_path: Path) -> None:
    first = ranks.run(kept, 3, tmp_path)
    assert all("taken from" not in said for _, (said,) in first)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 3
    for size in (1, 2, 3):
        for features, (said,) in ranks.run(kept, size, tmp_path):
            assert "taken from" in said
            assert torch.equal(features, first[0][0])


def test_features_on_disk_are_of_these_weights_images_and_patches(tmp_path: Path) -> None:
    def make(split: Split, patches: int, digest: str, **settings: Any) -> str:
        said: list[str] = []
        extractor = extractor_of(
            settings_of(RANDOM, cache_mb=0, **settings), ALONE,
            digest=digest, cache=tmp_path, tell=said.append,
        )  # fmt: skip
        extractor.features(split, patches)
        return said[0]

    first = split_of(9), 2, "a"
    assert "taken" not in make(*first)
    for other in ((split_of(8), 2, "a"), (split_of(9), 3, "a"), (split_of(9), 2, "b")):
        assert "taken" not in make(*other)
    assert "taken" not in make(*first, seed=1)
    for changed in (
        {"model": {"backbone": "resnet18"}},
        {"model": {"backbone_args": {"global_pool": "max"}}},
        {"model": {"stem": "small"}},
        {"data": {"val_size": 20}},
        {"data": {"val_resize": 18}},
        {"data": {"mean": [0.4] * 3}},
    ):
        assert "taken" not in make(*first, **changed), changed
        assert "taken" in make(*first, **changed), changed
    assert "taken" in make(*first)
    for path in tmp_path.glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-30])
    assert "taken" not in make(*first)  # damaged: made anew
    assert "taken" in make(*first)


def test_no_flipped_bit_of_features_on_disk_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = torch.arange(24.0).reshape(6, 4)
    block = Block(features, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    extractor = extractor_of(settings_of(RANDOM, cache_mb=0), ALONE, cache=tmp_path)
    extractor._keep(tmp_path, 0, 6, block)
    (path,) = tmp_path.iterdir()
    content, draw, damaged = bytearray(path.read_bytes()), random.Random(0), 0
    for at in draw.sample(range(8 * len(content)), 400):
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        found = module._kept(tmp_path, 1, 5)
        damaged += found is None
        assert found is None or torch.equal(found.features, features[1:5]), at
        content[at // 8] ^= 1 << at % 8
    assert damaged > 370  # but for white space
    assert caplog.text.count("cannot be read, made anew") == damaged


def test_few_features_are_not_kept(tmp_path: Path) -> None:
    settings = settings_of(RANDOM, cache_mb=1)
    extractor_of(settings, ALONE, cache=tmp_path).features(split_of(9))
    assert not list(tmp_path.iterdir())


def test_an_image_that_cannot_be_read_is_left_out(photos: Path, tmp_path: Path) -> None:
    files = sorted(photos.glob("class0/*.jpg"))[:4]
    names = []
    for i, file in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image" if i == 2 else file.read_bytes())
        names.append(f"{i}.jpg".encode())
    split = Split.of_files(str(tmp_path), names, np.array([0, 1, 2, -1]))
    for patches in (1, 2):
        extractor = extractor_of(settings_of(RANDOM), ALONE)
        block = extractor.features(split, patches)
        assert block.ids.tolist() == [0, 1]  # image 3 has no label
        assert list(extractor.bad.known) == [str(tmp_path / "2.jpg")]


def files_of(folder: Path, photos: Path) -> Split:
    """Six files; number 2 is no image."""
    folder.mkdir()
    for i, file in enumerate(sorted(photos.glob("class0/*.jpg"))[:6]):
        (folder / f"{i}.jpg").write_bytes(b"no image" if i == 2 else file.read_bytes())
    return Split.of_files(str(folder), [f"{i}.jpg".encode() for i in range(6)], np.arange(6))


def test_features_on_disk_still_say_what_cannot_be_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = files_of(tmp_path / "photos", photos)

    def make() -> tuple[list[int], list[str], bool]:
        said: list[str] = []
        settings = settings_of(RANDOM, cache_mb=0)
        extractor = extractor_of(settings, ALONE, cache=tmp_path / "kept", tell=said.append)
        ids = extractor.features(split).ids.tolist()
        return ids, list(extractor.bad.known), "taken from" in said[0]

    bad = tmp_path / "photos" / "2.jpg"
    others = [0, 1, 3, 4, 5]
    assert make() == (others, [str(bad)], False)
    assert make() == (others, [str(bad)], True)
    photo = (tmp_path / "photos" / "1.jpg").read_bytes()
    monkeypatch.setattr(
        module, "_stamps", lambda split: "the same"
    )  # so that the key stays the same
    assert make() == (others, [str(bad)], False)
    bad.write_bytes(photo)
    assert make() == ([0, 1, 2, 3, 4, 5], [], False)
    assert make() == ([0, 1, 2, 3, 4, 5], [], True)


def test_a_replaced_file_is_noticed(photos: Path, tmp_path: Path) -> None:
    split = files_of(tmp_path / "photos", photos)

    def make() -> Tensor:
        extractor = extractor_of(settings_of(RANDOM, cache_mb=0), ALONE, cache=tmp_path / "kept")
        return extractor.features(split).features

    before = make()
    assert torch.equal(make(), before)
    (tmp_path / "photos" / "4.jpg").write_bytes((tmp_path / "photos" / "0.jpg").read_bytes())
    after = make()
    assert not torch.equal(after, before)
    assert torch.equal(after[3], after[0])  # number 2 is left out
