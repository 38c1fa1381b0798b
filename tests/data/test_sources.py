"""The published data sets in their own formats, and what is said of missing files."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets

from ddp_ssl.config import NORMALISATION, Data
from ddp_ssl.data.datasets import folders
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.registry import DATASETS, find, load
from ddp_ssl.data.datasets.split import Split
from tests.data.images import write

WNIDS = ("n01440764", "n01443537", "n02000001")


def of(name: str, root: Path, **changes: Any) -> Dataset:
    return load(Data.model_validate({"name": name, "root": str(root), **changes}), seed=0)


def names(split: Split | None) -> list[str]:
    assert split is not None
    return [os.fsdecode(split.name(i)) for i in range(len(split))]


def images(root: Path, *files: str) -> Path:
    for i, file in enumerate(files):
        write(root / file, i, height=4, width=4)
    return root


def refused(name: str, root: Path | None, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message) as caught:
        load(Data(name=name, root=None if root is None else str(root)), seed=0)
    assert "\n" not in str(caught.value)


def test_every_documented_name_is_there() -> None:
    text = Data.model_fields["name"].description
    assert text is not None
    assert [name for name in DATASETS if f"`{name}`" not in text] == []
    assert set(NORMALISATION) <= set(DATASETS)


# --- ImageNet and its parts ----------------------------------------------------------------------


def test_imagenet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = images(tmp_path, *(f"{s}/{w}/{w}_1.JPEG" for s in ("train", "val") for w in WNIDS))
    with caplog.at_level(logging.WARNING, "ddp_ssl"):
        data = of("imagenet", root)
    assert data.class_names == WNIDS
    assert names(data.val) == [f"{w}/{w}_1.JPEG" for w in WNIDS]
    assert "imagenet: 3 class folders" in caplog.text
    assert "the whole data set has 1000" in caplog.text


def test_imagenet_that_is_not_sorted(tmp_path: Path) -> None:
    refused("imagenet", None, r"data.root: unset; data.name=imagenet looks for train/WNID/")
    refused("imagenet", tmp_path, "data.root: .* has no train/; .*ddp-ssl prepare-data imagenet /")
    images(tmp_path, "train/n01440764/1.JPEG")
    refused("imagenet", tmp_path, "data.root: .* has no val/; data.name=imagenet looks for")
    (tmp_path / "val").mkdir()
    refused("imagenet", tmp_path, "data.root: .*/val is empty; data.name=imagenet looks for")
    images(tmp_path, "val/ILSVRC2012_val_00000001.JPEG")
    refused("imagenet", tmp_path, "data.root: .*/val holds its images flat; .*parse_val_archive.*")
    os.remove(tmp_path / "val/ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "val/n01440764").mkdir()
    refused("imagenet", tmp_path, "data.root: .*/val has no images; .*prepare-data imagenet")


def test_the_list_of_imagenet100() -> None:
    classes = folders.imagenet100()
    assert len(set(classes)) == 100
    assert (classes[0], classes[-1]) == ("n01558993", "n13040303")
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in classes)


@pytest.mark.parametrize("beside", [(), ("n00000001", "n99999999")])
def test_imagenet100_is_a_part_of_imagenet(tmp_path: Path, beside: tuple[str, ...]) -> None:
    classes = folders.imagenet100()
    every = (*classes, *beside)
    images(tmp_path, *(f"{s}/{w}/{s}_{w}.JPEG" for s in ("train", "val") for w in every))
    data = of("imagenet100", tmp_path)
    assert data.class_names == tuple(sorted(classes))
    assert (len(data.train), data.num_classes) == (100, 100)
    assert names(data.val) == [f"{w}/val_{w}.JPEG" for w in sorted(classes)]
    assert data.train.labels.tolist() == list(range(100))


def test_imagenet100_with_classes_missing(tmp_path: Path) -> None:
    classes = folders.imagenet100()
    images(tmp_path, *(f"{s}/{w}/1.JPEG" for s in ("train", "val") for w in classes[2:]))
    refused("imagenet100", tmp_path, f"data.root: .*/train lacks 2 of the 100 .*{classes[0]}/;")
    for name in classes[:2]:
        (tmp_path / "train" / name).mkdir()
    refused("imagenet100", tmp_path, f"data.root: .*/train lacks 2 of the 100 .*{classes[0]}/;")


# --- other class folders -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inat21", "inat21_mini"])
@pytest.mark.parametrize("torchvisions", [True, False])
def test_inat21(tmp_path: Path, name: str, torchvisions: bool) -> None:
    mini = "_mini" if name == "inat21_mini" else ""
    train, val = (f"2021_train{mini}", "2021_valid") if torchvisions else (f"train{mini}", "val")
    species = ("00000_Animalia_Annelida_x", "00001_Plantae_y")
    images(tmp_path, *(f"{split}/{s}/a-b-c.jpg" for split in (train, val) for s in species))
    data = of(name, tmp_path)
    assert data.class_names == species
    assert os.path.basename(data.train.root) == train
    assert data.val is not None
    assert os.path.basename(data.val.root) == val
    other = "inat21" if mini else "inat21_mini"
    refused(other, tmp_path, f"data.root: .* has no train{'' if mini else '_mini'}/; .*2021_train")


def test_cinic10_does_not_use_its_valid(tmp_path: Path) -> None:
    images(
        tmp_path, *(f"{s}/{c}/{s}.png" for s in ("train", "valid", "test") for c in ("bird", "cat"))
    )
    data = of("cinic10", tmp_path)
    assert names(data.train) == ["bird/train.png", "cat/train.png"]
    assert names(data.val) == ["bird/test.png", "cat/test.png"]


TINY = tuple(f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(2))


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(tmp_path: Path, below: str) -> None:
    root = images(tmp_path / below, *TINY, "val/images/val_0.JPEG", "val/images/val_1.JPEG")
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    box = "\t0\t32\t44\t62\n"
    (root / "val/val_annotations.txt").write_text(
        f"val_1.JPEG\t{WNIDS[2]}{box}val_0.JPEG\t{WNIDS[1]}{box}"
    )
    data = of("tiny_imagenet", tmp_path)
    assert data.class_names == WNIDS
    assert names(data.train)[0] == f"{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert names(data.val) == ["images/val_1.JPEG", "images/val_0.JPEG"]
    assert data.val is not None
    assert data.val.labels.tolist() == [2, 1]
    assert all(os.path.exists(data.val.path(i)) for i in range(2))
    (root / "val/val_annotations.txt").write_text(f"val_0.JPEG\t{WNIDS[0]}{box}val_1.JPEG\tn9{box}")
    refused("tiny_imagenet", tmp_path, "data.root: .*val_annotations.txt, line 2: 'n9' is a class")


def test_tiny_imagenet_with_a_sorted_val(tmp_path: Path) -> None:
    images(tmp_path, *TINY, *(f"val/{w}/{w}.JPEG" for w in WNIDS))
    (tmp_path / "val/images").mkdir()  # what is left after sorting
    data = of("tiny_imagenet", tmp_path)
    assert names(data.val) == [f"{w}/{w}.JPEG" for w in WNIDS]


def test_tiny_imagenet_without_annotations(tmp_path: Path) -> None:
    images(tmp_path, *TINY, "val/images/val_0.JPEG")
    refused("tiny_imagenet", tmp_path, "data.root: .*/val has no val_annotations.txt; .*prepare-da")


# --- CIFAR ---------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """torchvision's files with three images each, for `cifar10` or `cifar100`."""

    def make(name: str) -> Path:
        kind = getattr(torchvision.datasets, name.upper())
        where = tmp_path / kind.base_folder
        where.mkdir()
        rng = np.random.default_rng(0)
        labels = "labels" if name == "cifar10" else "fine_labels"
        for file, _ in kind.train_list + kind.test_list:
            entry = {"data": rng.integers(0, 256, (3, 3072), np.uint8), labels: [2, 0, 1]}
            (where / file).write_bytes(pickle.dumps(entry))
        meta = {kind.meta["key"]: ["x", "y", "z"]}
        (where / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        return tmp_path

    return make


@pytest.mark.parametrize(("name", "train"), [("cifar10", 15), ("cifar100", 3)])
def test_cifar(cifar: Callable[[str], Path], name: str, train: int) -> None:
    root = cifar(name)
    data = of(name, root)
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (train, 3)
    assert data.class_names == ("x", "y", "z")
    assert data.val.labels.tolist() == [2, 0, 1]
    assert data.train.images is not None
    assert data.train.images.shape == (train, 32, 32, 3)
    reference = getattr(torchvision.datasets, name.upper())(str(root), train=True)
    assert (data.train.images == reference.data).all()
    assert data.labelled is data.train


def test_other_content_in_cifars_files_is_a_warning(
    cifar: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert len(of("cifar100", cifar("cifar100")).train) == 3
    (line,) = caplog.messages
    assert line.endswith("cifar-100-python: train, test, meta: not the published content, by MD5")


def test_damaged_cifar(cifar: Callable[[str], Path]) -> None:
    root = cifar("cifar10")
    file = root / "cifar-10-batches-py/test_batch"
    whole, fetch = file.read_bytes(), r"; ddp-ssl prepare-data cifar10 .*--download fetches it"
    entry = {"data": np.zeros((3, 3072), np.uint8), "labels": [1]}
    for content in (whole[:1000], b"<html>", pickle.dumps([1]), pickle.dumps(entry)):
        file.write_bytes(content)
        refused("cifar10", root, rf"data.root: .*test_batch cannot be used \(.*\){fetch}")


def test_cifar_executes_nothing(cifar: Callable[[str], Path], tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    root = cifar("cifar10")
    (root / "cifar-10-batches-py/data_batch_2").write_bytes(pickle.dumps({"data": Bad()}))
    refused(
        "cifar10", root, "data.root: .*data_batch_2 cannot be used .*mkdir is no array of numbers"
    )
    assert not (tmp_path / "executed").exists()


# --- STL-10 --------------------------------------------------------------------------------------


@pytest.fixture
def stl10(tmp_path: Path) -> Path:
    """The binary files: 4 labelled, 6 unlabelled and 3 test images, channels then columns."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 4), ("unlabeled", 6), ("test", 3)):
        pixels = rng.integers(0, 256, (count, 96, 96, 3), np.uint8)
        pixels.transpose(0, 3, 2, 1).tofile(folder / f"{name}_X.bin")
    np.array([10, 1, 2, 1], np.uint8).tofile(folder / "train_y.bin")
    np.array([3, 1, 10], np.uint8).tofile(folder / "test_y.bin")
    (folder / "fold_indices.txt").write_text("0 1\n")
    return tmp_path


def test_stl10_is_torchvisions(stl10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = of("stl10", stl10)
    assert data.val is not None
    assert data.labelled is not None
    assert data.train.labels.tolist() == [9, 0, 1, 0, *[-1] * 6]
    assert data.labelled.labels.tolist() == [9, 0, 1, 0]
    assert data.class_names[9] == "truck"
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    for split, ours in (("train+unlabeled", data.train), ("test", data.val)):
        theirs = torchvision.datasets.STL10(str(stl10), split)
        assert ours.images is not None
        assert (ours.images == theirs.data.transpose(0, 2, 3, 1)).all()
        assert ours.images.flags.c_contiguous
        assert ours.labels.tolist() == theirs.labels.astype(np.int8).tolist()
        assert (ours.images[1] == np.asarray(theirs[1][0])).all()
    assert data.labelled.images is not None
    assert data.train.images is not None
    assert (data.labelled.images == data.train.images[:4]).all()
    assert (of("stl10", stl10 / "stl10_binary").train.images == data.train.images).all()


def test_stl10_that_is_incomplete(stl10: Path) -> None:
    unlabelled = stl10 / "stl10_binary" / "unlabeled_X.bin"
    os.truncate(unlabelled, 5 * 27_648 + 7)
    refused("stl10", stl10, "data.root: .*unlabeled_X.bin is 138247 bytes, which is no number of")
    os.remove(unlabelled)
    refused("stl10", stl10, "data.root: .*unlabeled_X.bin is missing or empty; .*prepare-data s")
    refused("stl10", None, "data.root: unset; data.name=stl10 looks for torchvision's stl10_binary")


def test_stl10_with_other_labels(stl10: Path) -> None:
    np.array([1, 2], np.uint8).tofile(stl10 / "stl10_binary" / "test_y.bin")
    refused("stl10", stl10, "data.root: .*test_y.bin has 2 labels from 1 to 2; accepted: 3 labels")
    np.array([0, 1, 2, 3], np.uint8).tofile(stl10 / "stl10_binary" / "train_y.bin")
    refused("stl10", stl10, "data.root: .*train_y.bin has 4 labels from 0 to 3; accepted: 4 labels")


# --- MedMNIST ------------------------------------------------------------------------------------


def medmnist(file: Path, gray: bool, side: int = 28, **changes: Any) -> None:
    rng = np.random.default_rng(side)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        shape = (count, side, side) if gray else (count, side, side, 3)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 8, (count, 1)).astype(np.uint8)
    arrays |= changes
    np.savez(file, **{key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("name", "stem", "gray", "classes"),
    [
        ("blood", "bloodmnist", False, 8),
        ("organa", "organamnist", True, 11),
        ("organc", "organcmnist", True, 11),
        ("organs", "organsmnist", True, 11),
    ],
)
def test_medmnist(tmp_path: Path, name: str, stem: str, gray: bool, classes: int) -> None:
    medmnist(tmp_path / f"{stem}.npz", gray)
    data = of(name, tmp_path)
    assert data.val is not None
    assert (len(data.train), len(data.val), data.num_classes) == (5, 3, classes)
    arrays = np.load(tmp_path / f"{stem}.npz")
    assert data.val.labels.tolist() == arrays["test_labels"][:, 0].tolist()
    assert data.train.images is not None
    expected = arrays["train_images"]
    assert (data.train.images == (expected[..., None] if gray else expected)).all()


def test_the_28_px_of_medmnist_are_preferred(tmp_path: Path) -> None:
    medmnist(tmp_path / "bloodmnist_64.npz", False, 64)
    data = of("blood", tmp_path)
    assert data.train.images is not None
    assert data.train.images.shape == (5, 64, 64, 3)
    medmnist(tmp_path / "bloodmnist.npz", False)
    data = of("blood", tmp_path)
    assert data.train.images is not None
    assert data.train.images.shape == (5, 28, 28, 3)


def test_medmnist_that_cannot_be_used(tmp_path: Path) -> None:
    refused("blood", tmp_path, "data.root: .* has no bloodmnist.npz, nor .*prepare-data blood")
    file = tmp_path / "bloodmnist.npz"
    medmnist(file, False)
    file.write_bytes(file.read_bytes()[:1000])
    refused(
        "blood", tmp_path, "data.root: .*bloodmnist.npz is incomplete, damaged or not of MedMNIST"
    )
    file.write_bytes(b"<html>not found</html>")
    refused(
        "blood", tmp_path, "data.root: .*bloodmnist.npz is incomplete, damaged or not of MedMNIST"
    )
    medmnist(file, False, test_images=None)
    refused("blood", tmp_path, "data.root: .*bloodmnist.npz is .* MedMNIST: it has no test_images;")
    medmnist(file, False, train_labels=np.zeros((4, 1), np.uint8))
    refused("blood", tmp_path, "data.root: .*npz, train_labels: expected 5 numbers below 8, got")
    medmnist(file, False, train_labels=np.full((5, 1), 8, np.uint8))
    refused("blood", tmp_path, "data.root: .*npz, train_labels: expected 5 numbers below 8, got")
    medmnist(file, False, train_images=np.zeros((5, 28, 28, 3), np.float32))
    refused("blood", tmp_path, "data.root: .*npz, train_images: images: expected uint8")


def test_medmnist_executes_nothing(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    labels = np.empty((5, 1), object)
    labels[:] = Bad()
    medmnist(tmp_path / "bloodmnist.npz", False, train_labels=labels)
    refused(
        "blood", tmp_path, "data.root: .*bloodmnist.npz is incomplete, damaged or not of MedMNIST"
    )
    assert not (tmp_path / "executed").exists()


# --- lists ---------------------------------------------------------------------------------------


def listed(tmp_path: Path, text: str, **changes: Any) -> Dataset:
    file = tmp_path / "lists" / "train.csv"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, newline="")
    data = Data.model_validate({"name": "list", "files": str(file), "val_fraction": 0.4, **changes})
    find(data)
    return load(data, seed=0)


def every(data: Dataset) -> dict[str, int]:
    """Absolute path and label of all images."""
    return {
        os.fsdecode(split.path(i)): int(split.labels[i])
        for split in (data.train, data.val)
        if split is not None
        for i in range(len(split))
    }


def test_a_text_file_of_paths(tmp_path: Path) -> None:
    data = listed(tmp_path, "a/1.jpg\r\n\n../b 2.jpg\nc.jpg\n")
    below = tmp_path / "lists"
    assert set(every(data)) == {f"{below}/a/1.jpg", f"{below}/../b 2.jpg", f"{below}/c.jpg"}
    assert (data.class_names, data.labelled) == ((), None)
    data = listed(tmp_path, "path\na/1.jpg\nc.jpg\n", root=str(tmp_path))
    assert set(every(data)) == {f"{tmp_path}/a/1.jpg", f"{tmp_path}/c.jpg"}


@pytest.mark.parametrize("header", ["", "path,label\n", "\ufeffPath, Label\n"])
def test_a_csv_of_paths_and_classes(tmp_path: Path, header: str) -> None:
    text = header + 'b/1.jpg,zebra\n"a, or b.jpg",ant eater\n/x/3.jpg,zebra\nb/2.jpg,\nä.jpg,zebra'
    data = listed(tmp_path, text)
    assert data.class_names == ("ant eater", "zebra")
    below = tmp_path / "lists"
    assert every(data) == {
        f"{below}/b/1.jpg": 1,
        f"{below}/a, or b.jpg": 0,
        "/x/3.jpg": 1,
        f"{below}/b/2.jpg": -1,
        f"{below}/ä.jpg": 1,
    }
    assert data.labelled is not None
    assert set(data.labelled.labels.tolist()) <= {0, 1}


def test_numbers_as_classes_are_in_their_order(tmp_path: Path) -> None:
    data = listed(tmp_path, "a.jpg,10\nb.jpg,9\nc.jpg,100\n")
    assert data.class_names == ("9", "10", "100")


def test_a_list_for_validation(tmp_path: Path) -> None:
    val = tmp_path / "val.txt"
    val.write_text("x.jpg,b\n")
    data = listed(tmp_path, "1.jpg,a\n2.jpg,b\n", val_files=str(val))
    assert data.val is not None
    assert (len(data.train), data.val.labels.tolist()) == (2, [1])
    assert os.fsdecode(data.val.path(0)) == f"{tmp_path}/x.jpg"
    val.write_text("x.jpg,b\ny.jpg,c\n")
    with pytest.raises(ValueError, match=r"^data.val_files: .*val.txt, line 2: 'c' is a class"):
        listed(tmp_path, "1.jpg,a\n2.jpg,b\n", val_files=str(val))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,x\nb.jpg\n", r"line 2: 1 columns, expected 2; accepted: a path per line"),
        ("a.jpg\nb.jpg\n\nc.jpg,x\n", r"line 4: 2 columns, expected 1; accepted"),
        ("path,label\na.jpg,x,y\n", r"line 2: 3 columns, expected 2; accepted"),
        ("a.jpg,x,y\n", r"line 1: 3 columns; accepted"),
        ("a.jpg,x\n,y\n", r"line 2: an empty path; accepted"),
        ("path,label\n", r"lists no images; accepted"),
        ("", r"lists no images; accepted"),
        ("filename,label\n", r"lists no images; accepted"),
        ("a.jpg|cat\nb.jpg|dog\n", r"line 2: 'b.jpg\|dog' is no image; accepted: a path per"),
        ("\n\ncat,a.jpg\ndog,b.jpg\n", r"line 4: the images are in the second column; accepted"),
        ("cat,a.jpg\ndog,b.jpg\n", r"line 2: the images are in the second column; accepted"),
        ("label,file\ncat,a.jpg\ndog,b.jpg\n", r"line 2: the images are in the second column"),
        ("<html>\n<body>\n</body>\n", r"line 2: '<body>' is no image"),
        ("a.jpg,x\na.jpg,y\n", r"line 2: 'a.jpg' has the class 'y' here and 'x' in line 1"),
        ("a.jpg x\nb.jpg\n", r"line"),
        ("a.jpg;x\nb.jpg;y;z\n", r"line"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^data.files: /.*train.csv(,|) " + message) as caught:
        listed(tmp_path, text)
    assert str(caught.value).isprintable()


def test_lists_that_are_not_there(tmp_path: Path) -> None:
    refused("list", None, "data.files: unset; data.name=list looks for a text or CSV file; accept")
    for key, value, what in (
        ("files", tmp_path / "no.txt", "does not exist"),
        ("files", tmp_path, "is a folder"),
        ("val_files", tmp_path / "no.txt", "does not exist"),
        ("root", tmp_path / "no", "does not exist"),
    ):
        with pytest.raises(ValueError, match=rf"^data.{key}: .* {what}; "):
            listed(tmp_path, "a.jpg\n", **{key: str(value)})


@pytest.mark.parametrize("text", ['path\n"a.jpg\nb.jpg\n', '"a.jpg\nb.jpg"\n', "a\0b.jpg\n"])
def test_a_path_that_cannot_be_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=r"^data\.files: .*, line \d+: ") as caught:
        load(Data(name="list", files=str(tmp_path / "list.csv")), 0)
    assert "\n" not in str(caught.value)


def test_what_can_be_fetched_says_how(tmp_path: Path) -> None:
    for name, how in (("cinic10", "--download fetches it"), ("imagenet", "image-net.org")):
        with pytest.raises(ValueError, match=how):
            find(Data(name=name, root=str(tmp_path)))


def test_classes_that_nothing_is_trained_on_are_no_labels(tmp_path: Path) -> None:
    for name in ("train/0.jpg", "train/1.jpg", "val/a/0.jpg", "val/b/0.jpg"):
        write(tmp_path / name)
    data = load(Data(name="folder", root=str(tmp_path)), 0)
    assert data.num_classes == 0
    assert data.val is not None
    assert data.val.labels.tolist() == [-1, -1]
