"""Data sets in torchvision's layouts, and class folders with a `test/`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from scipy.io import savemat

from ddp_ssl.config import Data
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.registry import load
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.datasets.transfer import PUBLISHED
from ddp_ssl.data.recognise import look_at

Told = tuple[list[str], list[int]]


def told(split: Split | None) -> Told:
    """Names and labels."""
    assert split is not None
    return [os.fsdecode(split.name(i)) for i in range(len(split))], split.labels.tolist()


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def of(name: str, root: Path) -> Dataset:
    return load(Data(name=name, root=str(root)), seed=0)


# Each writes lists of two classes; the images are in no order of their names.


def food101(root: Path) -> tuple[Told, Told]:
    base = root / "food-101"
    (base / "images").mkdir(parents=True)
    text(base / "meta/train.json", json.dumps({"pie": ["pie/2", "pie/1"], "bun": ["bun/7"]}))
    text(base / "meta/test.json", json.dumps({"pie": ["pie/3"], "bun": ["bun/8"]}))
    at = "food-101/images"
    return (
        ([f"{at}/bun/7.jpg", f"{at}/pie/1.jpg", f"{at}/pie/2.jpg"], [0, 1, 1]),
        ([f"{at}/bun/8.jpg", f"{at}/pie/3.jpg"], [0, 1]),
    )


def cars(root: Path) -> tuple[Told, Told]:
    base = root / "stanford_cars"
    (base / "cars_train").mkdir(parents=True)
    (base / "cars_test").mkdir()
    (base / "devkit").mkdir()
    kind = np.dtype([("fname", object), ("class", object)])
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["Audi", "Fiat"], object)})
    for place, files in (
        ("devkit/cars_train_annos.mat", [("2.jpg", 1), ("1.jpg", 2)]),
        ("cars_test_annos_withlabels.mat", [("9.jpg", 2), ("8.jpg", 1)]),
    ):
        savemat(base / place, {"annotations": np.array(files, kind)})
    train, test = "stanford_cars/cars_train", "stanford_cars/cars_test"
    return (
        ([f"{train}/1.jpg", f"{train}/2.jpg"], [1, 0]),
        ([f"{test}/8.jpg", f"{test}/9.jpg"], [0, 1]),
    )


def aircraft(root: Path) -> tuple[Told, Told]:
    base = root / "fgvc-aircraft-2013b/data"
    text(base / "variants.txt", "A 320\nBoeing 7\n")
    text(base / "images_variant_trainval.txt", "12 Boeing 7\n11 A 320\n")
    text(base / "images_variant_test.txt", "13 A 320\n")
    at = "fgvc-aircraft-2013b/data/images"
    return ([f"{at}/11.jpg", f"{at}/12.jpg"], [0, 1]), ([f"{at}/13.jpg"], [0])


def dtd(root: Path) -> tuple[Told, Told]:
    base = root / "dtd/dtd/labels"
    for split, number in (("train", 1), ("val", 2), ("test", 3)):
        text(base / f"{split}1.txt", f"wavy/w{number}.jpg\ndotted/d{number}.jpg\n")
    at = "dtd/dtd/images"
    train = [f"{at}/dotted/d1.jpg", f"{at}/dotted/d2.jpg", f"{at}/wavy/w1.jpg", f"{at}/wavy/w2.jpg"]
    return (train, [0, 0, 1, 1]), ([f"{at}/dotted/d3.jpg", f"{at}/wavy/w3.jpg"], [0, 1])


def pets(root: Path) -> tuple[Told, Told]:
    base = root / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    text(base / "annotations/trainval.txt", "pug_2 2 2 1\nManx_1 1 1 1\n")
    text(base / "annotations/test.txt", "Manx_3 1 1 1\npug_4 2 2 1\n")
    at = "oxford-iiit-pet/images"
    return (
        ([f"{at}/Manx_1.jpg", f"{at}/pug_2.jpg"], [0, 1]),
        ([f"{at}/Manx_3.jpg", f"{at}/pug_4.jpg"], [0, 1]),
    )


def flowers102(root: Path) -> tuple[Told, Told]:
    base = root / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    savemat(base / "setid.mat", {"trnid": [4, 2], "valid": [1, 5], "tstid": [3, 6]})
    savemat(base / "imagelabels.mat", {"labels": [1, 102, 7, 2, 3, 4]})
    at = "flowers-102/jpg/image_0000"
    return (
        ([f"{at}{i}.jpg" for i in (1, 2, 4, 5)], [0, 101, 1, 2]),
        ([f"{at}{i}.jpg" for i in (3, 6)], [6, 3]),
    )


@pytest.mark.parametrize("write", [food101, cars, aircraft, dtd, pets, flowers102])
def test_published_splits(
    write: Callable[[Path], tuple[Told, Told]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = torchvision.datasets.Flowers102._file_dict
    monkeypatch.setattr(  # the lists here are none of the published ones
        torchvision.datasets.Flowers102, "_file_dict", {k: (v[0], None) for k, v in files.items()}
    )
    train, test = write(tmp_path)
    name = write.__name__
    made = of(name, tmp_path)
    assert (told(made.train), told(made.val)) == (train, test)
    assert made.train.root == str(tmp_path)
    assert made.num_classes == (102 if name == "flowers102" else 2)
    assert look_at(Data(root=str(tmp_path)), None).name == name


def caltech101(root: Path, label: str, count: int) -> None:
    for i in range(count):
        text(root / f"caltech101/101_ObjectCategories/{label}/image_{i + 1:04d}.jpg", "")


def sun397(root: Path, label: str, count: int) -> None:
    for i in range(count):
        text(root / f"SUN397/{label[0]}/{label}/sun_{i}.jpg", "")


def test_splits_that_torchvision_does_not_have(tmp_path: Path) -> None:
    """Thirty images of a class for training, or fifty and fifty; the same in every run."""
    for label, count in (("ant", 33), ("BACKGROUND_Google", 4), ("beaver", 40)):
        caltech101(tmp_path, label, count)
    made = of("caltech101", tmp_path)
    assert made.class_names == ("ant", "beaver")
    assert np.bincount(made.train.labels).tolist() == [30, 30]
    assert made.val is not None
    assert np.bincount(made.val.labels).tolist() == [3, 10]
    assert not {*told(made.train)[0]} & {*told(made.val)[0]}
    assert all(
        ("ant/" in name) == (label == 0) for name, label in zip(*told(made.val), strict=True)
    )
    assert told(of("caltech101", tmp_path).val) == told(made.val)

    for label, count in (("abbey", 103), ("bar", 60)):
        sun397(tmp_path, label, count)
    text(tmp_path / "SUN397/ClassName.txt", "/a/abbey\n/b/bar\n")
    made = of("sun397", tmp_path)
    assert made.val is not None
    assert np.bincount(made.train.labels).tolist() == [50, 50]
    assert np.bincount(made.val.labels).tolist() == [50, 10]
    assert not {*told(made.train)[0]} & {*told(made.val)[0]}


def break_food(root: Path) -> None:
    (root / "food-101/meta/test.json").write_text('{"pie": ["pie/3"]}')


def break_labels(root: Path) -> None:
    savemat(root / "flowers-102/imagelabels.mat", {"labels": [1, 103, 7, 2, 3, 4]})


def break_list(root: Path) -> None:
    (root / "oxford-iiit-pet/annotations/trainval.txt").write_text("pug_2\n")


def break_mat(root: Path) -> None:
    (root / "stanford_cars/devkit/cars_meta.mat").write_bytes(b"no mat")


@pytest.mark.parametrize(
    ("write", "spoil", "said"),
    [
        (food101, break_food, "its test images have other classes"),
        (pets, break_list, "not enough values to unpack"),
        (cars, break_mat, "Mat file"),
        (flowers102, break_labels, "Dataset not found or corrupted"),
    ],
)
def test_damage_is_one_line(
    write: Callable[[Path], Any], spoil: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    write(tmp_path)
    spoil(tmp_path)
    name = write.__name__
    with pytest.raises(
        ValueError, match=f"^data.root: {tmp_path} holds no whole {name}: .*({said})"
    ) as caught:
        of(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert f"accepted: the files of torchvision.datasets.{PUBLISHED[name].kind}" in str(
        caught.value
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_root_without_the_files_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^data.root: {tmp_path} has no {PUBLISHED[name].marker}"):
        of(name, tmp_path)
    assert not [*tmp_path.iterdir()]


# --- class folders -------------------------------------------------------------------------------


def test_a_test_folder_with_classes_comes_before_val(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "test/4.jpg"):
        text(tmp_path / name, "")
    assert told(of("train_test", tmp_path).val) == (["a/3.jpg"], [0])  # test/ has no classes
    text(tmp_path / "test/b/5.jpg", "")
    assert told(of("train_test", tmp_path).val)[0] == ["b/5.jpg"]


def test_both_folders_are_needed(tmp_path: Path) -> None:
    text(tmp_path / "train/a/1.jpg", "")
    with pytest.raises(ValueError, match="has not both; accepted: class folders in train/, and"):
        of("train_test", tmp_path)
