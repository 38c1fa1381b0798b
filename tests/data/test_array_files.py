"""`data.name=array`: which array is what, how it is held, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp_ssl.config import Config, ConfigError
from ddp_ssl.config.views import View
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.run.configure import load
from tests.data.images import loader_of, same, through_a_file

FLAT = "data.views=[{count: 2, size: 16, jitter_p: 0, gray_p: 0, solarize_p: 0}]"
X = np.random.default_rng(0).integers(0, 60_000, (20, 12, 10, 5)).astype(np.uint16)
Y = np.arange(20) % 3


def config(place: Path, *more: str) -> Config:
    return load(["folder/adadim", "data.name=array", f"data.root={place}", FLAT, *more]).config


def dataset(place: Path, *more: str) -> Dataset:
    return registry.load(config(place, *more).data, 0)


FORMS: dict[str, dict[str, Any]] = {
    "keras": {"x_train": X, "y_train": Y, "x_val": X[:4], "y_val": Y[:4], "x_test": X},
    "MedMNIST": {"train_images": X, "train_labels": Y[:, None], "val_images": X[:4],
                 "val_labels": Y[:4, None], "test_images": X},
    "one of L": {"X_train": X.transpose(0, 3, 1, 2), "Y_train": np.eye(3)[Y], "X_valid": X[:4],
                 "Y_valid": np.eye(3)[Y[:4]]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["npz", "compressed", "folder"])
def test_every_form_is_the_same_data_set(tmp_path: Path, form: str, kind: str) -> None:
    arrays = FORMS[form]
    if kind == "folder":
        for name, values in arrays.items():
            np.save(tmp_path / f"{name}.npy", values)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(tmp_path / "a.npz", **arrays)
    data = dataset(tmp_path if kind == "folder" else tmp_path / "a.npz")
    assert data.val is not None
    assert (len(data.train), len(data.val), data.class_names) == (20, 4, ("0", "1", "2"))
    assert data.train.labels.tolist() == Y.tolist()
    assert (data.train.pixels(np.array([7, 2])) == X[[7, 2]]).all()
    assert isinstance(data.train.images, np.memmap) == (kind != "compressed")


def test_a_part_of_a_mapped_array_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    data = dataset(tmp_path / "x.npy")
    assert data.val is not None
    assert data.num_classes == 0
    together = np.concatenate([s.pixels(np.arange(len(s))) for s in (data.train, data.val)])
    assert sorted(map(bytes, together)) == sorted(map(bytes, X))
    assert np.shares_memory(data.train.images, data.val.images)
    assert data.train.digest != data.val.digest


def test_statistics_are_those_of_the_values(tmp_path: Path) -> None:
    """Of bytes from 0 to 1, of others as they are; given ones stay."""
    for x, unit in ((X, 1.0), (X.astype(np.float32) - 7, 1.0), (X.astype(np.uint8), 255.0)):
        np.save(tmp_path / "x.npy", x)
        made = config(tmp_path / "x.npy")
        pixels = x.reshape(-1, 5).astype(np.float64) / unit
        np.testing.assert_allclose(np.array(made.data.mean), pixels.mean(0), rtol=1e-5)
        np.testing.assert_allclose(np.array(made.data.std), pixels.std(0), rtol=1e-5)
        assert made.model.backbone_args == {"in_chans": 5}
    given = "data.mean=[1, 2, 3, 4, 5]"
    assert config(tmp_path / "x.npy", given).data.mean == (1, 2, 3, 4, 5)


def test_views_have_the_channels_and_the_range(tmp_path: Path) -> None:
    """The same crops as of bytes, and a resumed loader goes on exactly."""
    for name, x in (("x", X), ("float", X.astype(np.float32) / 7)):
        np.save(tmp_path / f"{name}.npy", x)
    still = {"jitter_p": 0, "gray_p": 0}
    plain = [View(16, vertical_flip_p=0.5, rotate=90, **still), View(8, rotate=20, **still)]
    views = []
    for name in ("x", "float"):
        made = config(tmp_path / f"{name}.npy", "data.val_fraction=0.05")
        split = registry.load(made.data, 0).train
        mean, std = made.data.normalisation
        going, again = (loader_of(split, plain, mean=mean, std=std) for _ in range(2))
        views.append(next(going).views)
        assert again.load_state(through_a_file(going.state()), 1) is None
        assert all(same(next(going), next(again)) for _ in range(2))
    for ours, theirs in zip(*views, strict=True):
        assert ours.shape[:2] == (6, 5)
        assert 0.1 < ours.std() < 2
        assert (ours - theirs).abs().max() < 1e-3


def test_gray_images_have_their_brightness_changed(tmp_path: Path) -> None:
    """One channel stays one, with the operators of colour images."""
    np.save(tmp_path / "x.npy", (X[..., 0] // 256).astype(np.uint8))
    given = ["folder/adadim", "data.name=array", f"data.root={tmp_path}/x.npy"]
    made = load(given).config
    assert made.model.backbone_args == {"in_chans": 1}
    split = registry.load(made.data, 0).train
    batch = next(loader_of(split, mean=made.data.mean, std=made.data.std))
    assert [view.shape for view in batch.views] == [(6, 1, 16, 16), (6, 1, 8, 8)]


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.ones((20, 4), np.int64), "several labels an image"),
        (np.zeros((20, 12, 10), np.uint8), "a mask for each image"),
        (np.linspace(0, 1, 20), "numbers that are no classes"),
    ],
)
def test_labels_that_are_no_classes_are_said_and_left(
    tmp_path: Path, y: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(tmp_path / f"{said[:3]}.npz", x=X, y=y)
    data = dataset(tmp_path / f"{said[:3]}.npz")
    assert data.num_classes == 0
    assert set(data.train.labels) == {-1}
    assert [said in record.message for record in caplog.records].count(True) == 1


@pytest.mark.parametrize(
    ("arrays", "more", "said"),
    [
        ({"x": X.astype(np.int64)}, [], "numbers of int64; accepted: uint8, uint16, float32"),
        ({"x": X[:0, ..., 0].astype(np.uint8)}, [], r"x: an array of \[0, 12, 10\]; accepted: \[M"),
        ({"x": X[:, :5, :5]}, [], r"\[20, 5, 5, 5\]: its channels cannot be told"),
        ({"x": X, "y": Y[:3]}, [], r"20 images in x, labels of the shape \[3\]"),
        ({"x": X, "images": X}, [], "x and images are both images"),
        ({"a": X, "b": Y}, [], r"no images to train on \(arrays: a, b\)"),
        ({"x": X, "y": Y, "x_val": X, "y_val": Y + 1}, [], "3 is a class of the validation"),
        ({"x": np.full_like(X, np.nan, np.float32)}, [], "some values are not finite"),
        ({"x": X}, ["data.mean=[0.5]"], "data.mean: 1 numbers for images of 5 channels"),
        ({"x": X}, ["model.backbone_args={in_chans: 3}"], "in_chans: 3, and .* has 5 channels"),
        ({"x": X}, ["data.views.0.jitter_p=0.5"], "jitter_p are for bytes of 1 or 3 channels"),
        (
            {"x": X.repeat(4, 1).repeat(4, 2).repeat(8, 3)},
            ["data.views.0.rotate=90"],
            "pixels of up to 128 bytes",
        ),
        ({"x": np.array([{}])}, [], "is damaged or no array of numbers"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, arrays: dict[str, Any], more: list[str], said: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises((ConfigError, ValueError), match=said) as raised:
        dataset(tmp_path / "a.npz", *more)
    assert "\n" not in str(raised.value)


def test_names_of_arrays_can_be_given(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", tiles=X, kind=np.array(["b", "a"] * 10))
    data = dataset(tmp_path / "a.npz", "data.columns=[tiles, kind]")
    assert data.class_names == ("a", "b")
    assert data.train.labels[0] == 1
    for names in (["train_imgs", "train_lab"], ["my-pix", "Lab"]):  # in other files' conventions
        np.savez(tmp_path / "b.npz", **dict(zip(names, (X, Y), strict=True)))
        data = dataset(tmp_path / "b.npz", f"data.columns=[{', '.join(names)}]")
        assert data.class_names == ("0", "1", "2")


def test_a_folder_for_each_split(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("Val", 4)):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "x.npy", X[:count])
        np.save(tmp_path / split / "y.npy", Y[:count])
    data = dataset(tmp_path)
    assert data.val is not None
    assert (len(data.train), len(data.val), data.class_names) == (20, 4, ("0", "1", "2"))
    assert load([str(tmp_path)]).config.data.name == "array"


def test_a_file_alone_is_enough(tmp_path: Path) -> None:
    np.savez(tmp_path / "five.npz", x=X)
    views = load([str(tmp_path / "five.npz")]).config.data.views
    assert {(view.jitter_p, view.gray_p, view.solarize_p) for view in views} == {(0, 0, 0)}
    np.savez(tmp_path / "a.npz", x=(X[..., :3] // 256).astype(np.uint8), y=Y)
    resolved = load([str(tmp_path / "a.npz")])
    assert resolved.config.data.name == "array"
    assert "18 images in arrays" in resolved.notes[0]
