"""Near misses of a layout or of a list: accepted as meant, told of, or refused; never silent."""

from __future__ import annotations

import itertools
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp_ssl.config import Data
from ddp_ssl.data.datasets import scan
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.registry import find, load
from ddp_ssl.data.datasets.split import Split


@pytest.fixture(autouse=True)
def _said_again(caplog: pytest.LogCaptureFixture) -> None:
    scan.warn_once.cache_clear()
    caplog.set_level(logging.INFO, "ddp_ssl")


def made(root: Path, *names: str) -> Path:
    """Files of these names; a data set is found by names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def folder(root: Path) -> Dataset:
    data = Data(name="folder", root=str(root))
    find(data)
    return load(data, 0)


def names(split: Split | None) -> set[str]:
    assert split is not None
    return {split.name(i).decode() for i in range(len(split))}


# --- splits --------------------------------------------------------------------------------------

USUAL = [
    ("Train", "Val"), ("training", "val"), ("TRAIN", "VALID"), ("train", "validation"),
    ("Training", "Valid"), ("train", "valid"), ("training", "Validation"),
]  # fmt: skip


@pytest.mark.parametrize(("train", "val"), USUAL)
def test_the_usual_names_of_splits_are_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train: str, val: str
) -> None:
    made(tmp_path, *(f"{s}/{c}/{i}.jpg" for s in (train, val) for c in "ab" for i in range(3)))
    data = folder(tmp_path)
    assert data.class_names == ("a", "b")
    assert (len(data.train), len(names(data.val))) == (6, 6)
    assert data.val is not None
    assert Path(data.val.root).name == val
    assert caplog.messages == []


def test_the_very_name_comes_before_others_of_its_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, count in (("train", 3), ("Train", 2), ("val", 1), ("validation", 2)):
        made(tmp_path, *(f"{split}/a/{i}.jpg" for i in range(count)))
    data = folder(tmp_path)
    assert (len(data.train), len(names(data.val))) == (3, 1)
    assert any("not used: Train/, validation/" in message for message in caplog.messages)


@pytest.mark.parametrize("unused", ["test", "Testing", "holdout", "my-test-set", "eval_2"])
def test_an_unused_split_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unused: str
) -> None:
    made(tmp_path, *(f"{s}/a/{i}.jpg" for s in ("train", unused) for i in range(10)))
    data = folder(tmp_path)
    assert (len(data.train), len(names(data.val))) == (9, 1)
    assert any(f"train/ alone is used; not used: {unused}/" in m for m in caplog.messages)
    held = "1 of the 10 images are held out for validation (data.val_fraction=0.1)"
    assert any(held in message for message in caplog.messages)


def test_a_folder_beside_the_splits_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    made(tmp_path, *(f"{s}/a/{i}.jpg" for s in ("train", "val") for i in range(3)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/loop").symlink_to("loop")
    assert len(folder(tmp_path).train) == 3


def test_a_class_called_train_beside_other_classes_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, *(f"{c}/{i}.jpg" for c in ("bus", "car", "train") for i in range(3)))
    made(tmp_path, "annotations/bus.xml", "@eaDir/0.jpg")
    folder(tmp_path)
    assert any("train/ alone is used; not used: bus/, car/" in m for m in caplog.messages)


LIKE_SPLITS = [("train_set", "test_set"), ("val", "test"), ("imgs.train", "x"), ("Test", "a"),
               ("train-2017", "val-2017")]  # fmt: skip


@pytest.mark.parametrize("classes", LIKE_SPLITS)
def test_classes_called_like_splits_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, classes: tuple[str, str]
) -> None:
    made(tmp_path, *(f"{c}/{i}.jpg" for c in classes for i in range(3)))
    assert folder(tmp_path).num_classes == 2
    assert any("like splits; accepted for splits: train or training" in m for m in caplog.messages)


def test_other_classes_are_not_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classes = ("strain", "rainier", "contest", "valley", "interval", "developer", "n01440764")
    made(tmp_path, *(f"{c}/{i}.jpg" for c in classes for i in range(3)))
    assert folder(tmp_path).num_classes == len(classes)
    assert [r.levelname for r in caplog.records] == ["INFO"]  # the images held out


# --- images passed over --------------------------------------------------------------------------


def test_what_is_passed_over_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, *(f"a/{i}.jfif" for i in range(4)), "a/4.JPE", *(f"b/{i}.gif" for i in range(3)))
    made(tmp_path, "b/list.txt", "c/1.jpg", "c/2.jpg", "c/README", "d/.hidden.jpg")
    made(tmp_path, "c/@eaDir/1.jpg/THUMB.jpg", "@eaDir/2.jpg", "Thumbnails/1.jpg", "e/x/3.heic")
    data = folder(tmp_path)
    assert data.class_names == ("a", "c")
    assert len(names(data.train)) + len(names(data.val)) == 7
    said = [message for message in caplog.messages if message.startswith(f"{tmp_path}: ")]
    assert said == [
        f"{tmp_path}: 6 files passed over by their extension (3 .gif, 1 .txt, 1 without one); "
        "3 folders of thumbnails or of the system passed over (@eaDir/, Thumbnails/); "
        "3 class folders without images (b/, d/, e/)"
    ]
    assert [r.levelname for r in caplog.records if r.getMessage() in said] == ["WARNING"]


def test_names_in_messages_are_printable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, "a/1.jpg", "a/2.jpg", "b\x1b[2J\nforged/x.gif")
    folder(tmp_path)
    assert all(message.isprintable() for message in caplog.messages)
    assert "b\\x1b[2J\\nforged/" in caplog.text


def test_one_class_and_one_validation_image_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, *(f"train/only/{i}.jpg" for i in range(5)), "val/only/1.jpg")
    folder(tmp_path)
    assert any("one class only (only): the accuracy of k-NN" in m for m in caplog.messages)
    assert any("one validation image only" in message for message in caplog.messages)


# --- lists ---------------------------------------------------------------------------------------

HEADERS = (None, ("path", "label"), ("filename", "label"), ("image_id", "species"), ("x", "y"),
           ("img", "-1"))  # fmt: skip


def listed(tmp_path: Path, text: str, **changes: Any) -> Dataset:
    file = tmp_path / "list.csv"
    file.write_text(text, newline="")
    data = Data.model_validate({"name": "list", "files": str(file), **changes})
    find(data)
    return load(data, 0)


CASES = [  # without extensions only CSV is recognised
    *itertools.product(",\t; ", HEADERS, ["\n", "\r\n"], [".jpg"]),
    *itertools.product(",", HEADERS, ["\n"], [""]),
]


@pytest.mark.parametrize(("separator", "header", "end", "extension"), CASES)
def test_separators_and_headers_are_recognised(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    separator: str,
    header: tuple[str, str] | None,
    end: str,
    extension: str,
) -> None:
    draw = random.Random(str((separator, header, end)))
    files = [f"a {i}/b.{draw.randrange(9)}-{i}{extension}" for i in range(12)]
    made(tmp_path, *files)
    classes = [draw.choice(["dog", "cat", "ox"]) for _ in files[:-1]]
    lines = [separator.join(pair) for pair in zip(files[:-1], classes, strict=True)]
    lines.append(separator.join((files[-1], "-1")))
    text = end.join([*([separator.join(header)] if header else []), *lines]) + end
    data = listed(tmp_path, text)
    assert data.class_names == tuple(sorted(set(classes)))
    assert names(data.train) | names(data.val) == set(files)
    said = f"{len(set(classes))} classes, 12 images, 1 of them unlabelled"
    said += ", header skipped" if header else ""
    word = {",": "", "\t": ", separated by tab", ";": ", separated by semicolon",
            " ": ", separated by space"}[separator]  # fmt: skip
    assert f"data.files: {tmp_path}/list.csv: {said}{word}" in caplog.messages


def test_a_column_of_paths_with_spaces_and_a_header_that_is_no_word(tmp_path: Path) -> None:
    files = [f"my cat {i}.jpg" for i in range(4)]
    made(tmp_path, *files)
    for header in ("", "the file\n", "filename\n"):
        data = listed(tmp_path, header + "\n".join(files))
        assert names(data.train) | names(data.val) == set(files)
        assert data.num_classes == 0
    data = listed(tmp_path, "missing.jpg\n" + "\n".join(files))  # an image, noticed when read
    assert len(names(data.train) | names(data.val)) == 5


def test_a_folder_called_like_a_header_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    data = listed(tmp_path, "images,label\na.jpg,x\nb.jpg,y\n", val_fraction=0.5)
    assert data.class_names == ("x", "y")


def test_repeated_lines_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = listed(tmp_path, "a.jpg,x\nb.jpg,y\na.jpg,x\na.jpg,x\n")
    assert len(data.train) + len(names(data.val)) == 4
    message = f"data.files: {tmp_path}/list.csv: 2 classes, 4 images, 2 of the images listed more "
    assert any(m.startswith(message) for m in caplog.messages)


def test_numbers_with_minus_one_stay_numbers(tmp_path: Path) -> None:
    data = listed(tmp_path, "a.jpg,10\nb.jpg,9\nc.jpg,-1\nd.jpg,9\n", val_fraction=0.5)
    assert data.class_names == ("9", "10")
    labels = np.concatenate([data.train.labels, data.val.labels])  # type: ignore[union-attr]
    assert sorted(labels.tolist()) == [-1, 0, 0, 1]
