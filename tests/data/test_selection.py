"""Held-out images, `data.fraction` and `data.skip`."""

from __future__ import annotations

import itertools
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp_ssl.config import Data
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.registry import load
from ddp_ssl.data.datasets.selection import Skip, fraction_of, held_out, per_class
from ddp_ssl.data.datasets.split import Names, Split
from tests.data.images import write


def of(root: Path, seed: int = 0, **changes: Any) -> Dataset:
    return load(Data.model_validate({"name": "folder", "root": str(root), **changes}), seed)


def names(split: Split | None) -> set[str]:
    assert split is not None
    return {os.fsdecode(split.name(i)) for i in range(len(split))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Classes of 20, 10 and 1 training images, and 2 of each for validation."""
    for name, count in (("a", 20), ("b", 10), ("c", 1)):
        for i in range(count):
            write(tmp_path / f"data/train/{name}/{name}{i:02d}.png", height=4, width=4)
        for i in range(2):
            write(tmp_path / f"data/val/{name}/v{name}{i}.png", height=4, width=4)
    return tmp_path / "data"


# --- held out ------------------------------------------------------------------------------------


def test_so_many_of_each_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 2, 5], [40, 7, 30]))
    ten, one, other = (per_class(labels, n, s) for n, s in ((10, 0), (1, 0), (10, 1)))
    assert np.bincount(labels[ten]).tolist() == [10, 0, 7, 0, 0, 10]
    assert np.bincount(labels[one]).tolist() == [1, 0, 1, 0, 0, 1]
    assert (one <= ten).all()
    assert (ten != other).any()
    assert (per_class(labels, 10, 0) == ten).all()


def test_each_class_gives_its_part() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 24))
    mask = held_out(labels, 0.1)
    assert mask.sum() == 120
    assert set(np.bincount(labels[mask])) == {2, 3}
    assert (held_out(labels, 0.1) == mask).all()


def test_small_classes_are_held_out_in_turn() -> None:
    """Of 1000 classes of 4, a tenth is 400 images, though it rounds to none of each."""
    labels = np.repeat(np.arange(1000), 4)
    mask = held_out(labels, 0.1)
    assert mask.sum() == 400
    assert np.bincount(labels[mask]).max() == 1


def test_one_of_each_class_is_left_to_train_on() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    mask = held_out(labels, 0.9)
    assert np.bincount(labels[mask], minlength=3).tolist() == [2, 0, 1]
    assert held_out(np.array([0, 1, 1]), 0.01).sum() == 1
    assert held_out(np.array([0, 1]), 0.5).sum() == 1
    assert held_out(np.array([0]), 0.5).sum() == 0


# --- fraction ------------------------------------------------------------------------------------


def test_fractions_are_nested_stratified_and_seeded() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([-1, 0, 1, 2], [500, 300, 200, 3]))
    masks = [fraction_of(labels, f, seed=3) for f in (0.01, 0.1, 0.5, 0.9)]
    assert [np.bincount(labels[m] + 1).tolist() for m in masks] == [
        [5, 3, 2, 1],
        [50, 30, 20, 1],
        [250, 150, 100, 2],
        [450, 270, 180, 3],
    ]
    for smaller, larger in itertools.pairwise(masks):
        assert (smaller <= larger).all()
    assert (fraction_of(labels, 0.5, seed=3) == masks[2]).all()
    assert (fraction_of(labels, 0.5, seed=4) != masks[2]).any()


def test_a_fraction_of_the_training_images_only(root: Path) -> None:
    whole, part, other = of(root), of(root, fraction=0.3), of(root, seed=1, fraction=0.3)
    assert np.bincount(part.train.labels).tolist() == [6, 3, 1]
    assert names(part.train) < names(whole.train)
    assert names(part.train) != names(other.train)
    assert names(part.val) == names(whole.val)
    assert names(part.labelled) == names(whole.train)  # the probe keeps all labels
    assert part.class_names == ("a", "b", "c")
    assert whole.labelled is whole.train


def test_a_fraction_beside_held_out_images(root: Path) -> None:
    whole, part = of(root / "train"), of(root / "train", seed=5, fraction=0.5)
    assert names(part.val) == names(whole.val)
    assert names(part.labelled) == names(whole.train)
    assert not names(part.labelled) & names(part.val)


# --- skip ----------------------------------------------------------------------------------------


def test_listed_images_are_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    listing = root.parent / "bad.txt"
    lines = [
        "a/a03.png\ttruncated at byte 12",  # from the split's folder
        "train/b/b00.png",  # from data.root
        f"{root}/val/a/va1.png\tnot an image",
        f"{root}/val/a/va1.png",  # twice
        "a/a3.png",  # another name
        "../elsewhere.png",
        "",
    ]
    listing.write_text("\r\n".join(lines))
    with caplog.at_level(logging.WARNING, "ddp_ssl"):
        data = of(root, skip=str(listing))
    whole = of(root)
    assert names(whole.train) - names(data.train) == {"a/a03.png", "b/b00.png"}
    assert names(whole.val) - names(data.val) == {"a/va1.png"}
    assert names(data.labelled) == names(data.train)
    assert caplog.messages == [f"data.skip: 2 of the 5 images in {listing} are not in the data"]


def test_what_is_left_out_does_not_change_what_is_chosen(root: Path) -> None:
    listing = root.parent / "bad.txt"
    whole = of(root / "train", fraction=0.5)
    first = min(names(whole.train))
    gone = min(names(whole.val))
    listing.write_text(f"{first}\n{gone}\n")
    part = of(root / "train", fraction=0.5, skip=str(listing))
    assert names(part.train) == names(whole.train) - {first}
    assert names(part.val) == names(whole.val) - {gone}
    assert names(part.labelled) == names(whole.labelled) - {first}


def test_names_that_are_no_text(tmp_path: Path) -> None:
    split = Split.of_files(str(tmp_path), [b"a/\xff.jpg", b"a/b.jpg"], np.array([0, 0]))
    (tmp_path / "bad.txt").write_bytes(b"a/\xff.jpg\n")
    skip = Skip.of_file(tmp_path / "bad.txt", str(tmp_path))
    assert skip.keep(split).tolist() == [False, True]
    assert skip.unknown == 0


def test_images_of_a_store_by_their_addresses(tmp_path: Path) -> None:
    """As `bad_images.txt` and check-data write them, and relative to the root or to the split."""
    lines = [b"s3://bucket/out/train/c0/1.jpg", b"train/c0/2.jpg", b"./train/c0/3.jpg", b"c0/4.jpg"]
    others = [b"s3://bucket/else/train/c0/0.jpg", b"/out/train/c0/0.jpg"]
    (tmp_path / "bad.txt").write_bytes(b"\n".join([*lines, *others]) + b"\tcut\n")
    split = Split.of_files(
        "s3://bucket/out/train", [b"c0/%d.jpg" % i for i in range(5)], np.zeros(5)
    )
    skip = Skip.of_file(tmp_path / "bad.txt", "s3://bucket/out")
    assert skip.keep(split).tolist() == [True, False, False, False, False]
    assert skip.unknown == 2


def test_arrays_have_no_names() -> None:
    skip = Skip([b"a"], b"/")
    assert skip.keep(Split.of_array(np.zeros((2, 4, 4), np.uint8))).all()
    assert skip.unknown == 1


def test_many_names_take_no_python_objects(tmp_path: Path) -> None:
    made = Names()
    count = 200_000
    for i in range(count):
        made.append(b"%05d_Animalia/%036d.jpg" % (i % 1000, i))
    split = Split.of_files(str(tmp_path), made, np.zeros(count))
    listed = [split.name(i) for i in range(0, count, 97)]
    skip = Skip(listed, os.fsencode(tmp_path))
    start = time.perf_counter()
    keep = skip.keep(split)
    assert time.perf_counter() - start < 5  # 0.1 s on a quiet core; a loop over names takes longer
    assert np.flatnonzero(~keep).tolist() == list(range(0, count, 97))
    assert skip.unknown == 0


def test_a_list_with_a_byte_order_mark_and_one_beside_a_list_of_files(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        write(tmp_path / "data" / name)
    (tmp_path / "data" / "list.txt").write_text("a.jpg\nb.jpg\nc.jpg\nd.jpg\n")
    skip = tmp_path / "skip.txt"
    skip.write_bytes(b"\xef\xbb\xbfa.jpg\treason\n")
    data = Data(name="list", files=str(tmp_path / "data" / "list.txt"), skip=str(skip))
    made = load(data, 0)
    assert made.val is not None
    assert len(made.train) + len(made.val) == 3


def test_a_list_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("train/a/0.jpg", "val/a/0.jpg"):
        write(tmp_path / name)
    (tmp_path / "skip.txt").write_text("val/a/0.jpg\n")
    data = Data(name="folder", root=str(tmp_path), skip=str(tmp_path / "skip.txt"))
    with pytest.raises(ValueError, match=r"^data.skip: .* leaves no validation images"):
        load(data, 0)
