"""Data sets by name: layouts of folders, the cached digits, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddp_ssl.config import Data
from ddp_ssl.data.datasets import cache, digits
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.registry import find, load
from ddp_ssl.data.datasets.split import Names, Split
from tests.data.images import write

JPEG = "a.jpg"


def folder(root: Path, **changes: object) -> Dataset:
    data = Data.model_validate({"name": "folder", "root": str(root), **changes})
    find(data)
    return load(data, seed=0)


def paths(split: Split) -> list[str]:
    """Paths relative to the split's root."""
    absolute = [os.fsdecode(split.path(i)) for i in range(len(split))]
    return [os.path.relpath(path, split.root) for path in absolute]


# --- folders -------------------------------------------------------------------------------------


def test_train_and_val_with_class_folders(tmp_path: Path) -> None:
    for name in ("train/b/2.jpg", "train/b/1.PNG", "train/a/1.jpg", "val/b/1.jpg"):
        write(tmp_path / name)
    data = folder(tmp_path)
    assert data.val is not None
    assert (data.class_names, data.num_classes) == (("a", "b"), 2)
    assert paths(data.train) == ["a/1.jpg", "b/1.PNG", "b/2.jpg"]
    assert data.train.labels.tolist() == [0, 1, 1]
    assert paths(data.val) == ["b/1.jpg"]
    assert data.val.labels.tolist() == [1]  # the number that train gives the class


def test_hidden_empty_foreign_and_nested_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a/x/y/1.jpg", "a/0.jpg", "c/1.jpg", ".hidden/1.jpg", "c/.2.jpg", "a/.x/3.jpg"):
        write(tmp_path / name)
    (tmp_path / "c" / "notes.txt").write_text("no image")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    (tmp_path / "c" / "nowhere.jpg").symlink_to(tmp_path / "missing.jpg")
    data = folder(tmp_path)
    assert data.val is not None
    assert data.class_names == ("a", "c")
    assert sorted(paths(data.train) + paths(data.val)) == ["a/0.jpg", "a/x/y/1.jpg", "c/1.jpg"]


def test_linked_class_folders_count(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "1.jpg")
    write(tmp_path / "data" / "a" / "1.jpg")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    assert folder(tmp_path / "data").class_names == ("a", "b")


@pytest.mark.parametrize("flat", [True, False])
def test_a_share_is_held_out(tmp_path: Path, flat: bool) -> None:
    for i in range(20):
        write(tmp_path / ("" if flat else f"class{i % 2}") / f"{i:02d}.png", height=4, width=4)
    data, again = folder(tmp_path, val_fraction=0.25), folder(tmp_path, val_fraction=0.25)
    other = load(Data(name="folder", root=str(tmp_path), val_fraction=0.25), seed=1)
    assert data.val is not None
    assert again.val is not None
    assert other.val is not None
    assert (len(data.train), len(data.val)) == (15, 5)
    assert len(set(paths(data.train) + paths(data.val))) == 20
    assert paths(data.val) == paths(again.val) == paths(other.val)  # whatever the seed
    assert data.train.digest == again.train.digest == other.train.digest
    if flat:
        assert (data.class_names, data.num_classes) == ((), 0)
        assert set(data.train.labels.tolist()) == {-1} == set(data.val.labels.tolist())


def test_held_out_is_one_image_at_least(tmp_path: Path) -> None:
    write(tmp_path / "train" / "1.jpg")
    assert folder(tmp_path).val is None  # nothing would be left to train on
    write(tmp_path / "train" / "2.jpg")
    data = folder(tmp_path)
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (1, 1)


def test_names_are_bytes(tmp_path: Path) -> None:
    os.rename(write(tmp_path / "ä ö" / "1.jpg"), os.fsencode(tmp_path / "ä ö") + b"/\xff.jpg")
    write(tmp_path / "ä ö" / "2.jpg")
    data = folder(tmp_path)
    assert data.val is not None
    found = [split.path(0) for split in (data.train, data.val)]
    assert all(os.path.exists(path) for path in found)
    assert {os.path.basename(path) for path in found} == {b"\xff.jpg", b"2.jpg"}


# --- splits --------------------------------------------------------------------------------------


def test_subset_and_digest(tmp_path: Path) -> None:
    names = [b"a/1.jpg", b"b/22.jpg", b"c/333.jpg"]
    split = Split.of_files(str(tmp_path), names, np.array([0, 1, 2]))
    part = split.subset(np.array([2, 0]))
    assert paths(part) == ["c/333.jpg", "a/1.jpg"]
    assert part.labels.tolist() == [2, 0]
    elsewhere = Split.of_files("/elsewhere", names, np.array([0, 1, 2]))
    relabelled = Split.of_files(str(tmp_path), names, np.array([0, 1, 1]))
    assert split.digest == elsewhere.digest
    assert len({split.digest, part.digest, relabelled.digest}) == 3


def test_arrays_gray_and_refused() -> None:
    gray = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    split = Split.of_array(gray)
    assert split.images is not None
    assert split.images.shape == (2, 4, 4, 3)
    assert (split.images == gray[..., None]).all()
    assert split.labels.tolist() == [-1, -1]
    assert split.digest != Split.of_array(gray + 1).digest
    assert split.subset(np.array([1])).images.shape == (1, 4, 4, 3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="expected uint8"):
        Split.of_array(gray.astype(np.float32))  # type: ignore[arg-type]


def test_many_files_take_no_python_objects() -> None:
    names = Names()
    for i in range(50_000):
        names.append(b"class%04d/image%08d.jpg" % (i % 1000, i))
    split = Split.of_files("/r", names, np.zeros(50_000))
    assert split.path(49_999) == b"/r/class0999/image00049999.jpg"
    assert split.names is not None
    assert split.names.nbytes == 27 * 50_000


# --- digits --------------------------------------------------------------------------------------


def test_digits_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path / "cache"))
    data = load(Data(name="digits"), seed=0)
    assert data.val is not None
    assert (len(data.train) + len(data.val), data.num_classes) == (1797, 10)
    assert len(data.val) == sum(round(n / 5) for n in np.bincount(np.r_[_labels(data)]))
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["digits-32-v1"]

    def never(_: Path) -> None:
        raise AssertionError("written twice")

    monkeypatch.setattr(digits, "write", never)
    again = load(Data(name="digits"), seed=5)
    assert again.train.digest == data.train.digest


def test_damaged_digits_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path))
    digest = load(Data(name="digits"), seed=0).train.digest
    image = next((tmp_path / "digits-32-v1/train/3").iterdir())
    content = image.read_bytes()
    damages: list[Callable[[], object]] = [
        lambda: image.write_bytes(content[:400] + b"\0" + content[401:]),
        image.unlink,
        (tmp_path / "digits-32-v1/checksum").unlink,
    ]
    for damage in damages:
        damage()
        caplog.clear()
        assert load(Data(name="digits"), seed=0).train.digest == digest
        assert "digits-32-v1 is damaged or of an earlier version: written again" in caplog.text
        assert image.read_bytes() == content


def _labels(data: Dataset) -> np.ndarray:  # type: ignore[type-arg]
    assert data.val is not None
    return np.concatenate([data.train.labels, data.val.labels])


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDP_SSL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "ddp_ssl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "ddp_ssl"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"^DDP_SSL_CACHE: cannot write .*digits"):
        load(Data(name="digits"), seed=0)


def test_writing_is_atomic(tmp_path: Path) -> None:
    """A writer that fails leaves nothing; one that comes second uses the first one's folder."""
    target = tmp_path / "made"

    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    def overtaken(folder: Path) -> None:
        cache.write_atomically(target, lambda other: (other / "first").touch())
        (folder / "second").touch()

    with pytest.raises(OSError, match="disk full"):
        cache.write_atomically(target, fails)
    assert list(tmp_path.iterdir()) == []
    cache.write_atomically(target, overtaken)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in target.iterdir()] == ["first"]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifar11"}, r"data.name: unknown data set 'cifar11'; did you mean cifar10\?"),
        ({"name": "zzz"}, "data.name: unknown data set 'zzz'; accepted: aircraft, array, blood,"),
        ({"name": "folder"}, "data.root: unset; data.name=folder looks for class folders under"),
        ({"name": "folder", "root": "{}/no"}, "data.root: .*/no does not exist; .*flat folder"),
        ({"name": "folder", "root": "{}/file"}, "data.root: .*/file is not a folder"),
        ({"name": "folder", "root": "{}/bare"}, r"data.root: .*/bare has no images \(.*\.jpg"),
        ({"name": "digits", "root": "{}"}, "data.root: .* is not used by data.name=digits"),
        ({"name": "folder", "root": "{}", "files": "x"}, "data.files: is for data.name=list, not"),
        ({"name": "digits", "skip": "{}/no"}, "data.skip: .*/no is not a file; accepted"),
        (
            {"name": "cifar10"},
            "data.root: unset; .*ddp-ssl prepare-data cifar10 FOLDER --download fetches it",
        ),
        (
            {"name": "cifar100", "root": "{}"},
            "data.root: .* has no cifar-100-python/train; .*ddp-ssl prepare-data cifar100 /",
        ),
    ],
)
def test_what_cannot_be_found(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    (tmp_path / "bare" / "class").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    settings = {key: value.format(tmp_path) for key, value in settings.items()}
    with pytest.raises(ValueError, match="^" + message) as caught:
        find(Data.model_validate(settings))
    assert "\n" not in str(caught.value)


def test_a_class_of_val_that_train_does_not_have(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a" / JPEG)
    write(tmp_path / "val" / "b" / JPEG)
    with pytest.raises(ValueError, match=r"^data.root: .*/val/b is a class that train/ does not"):
        folder(tmp_path)


def test_a_flat_val_beside_a_train_with_classes(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a" / JPEG)
    write(tmp_path / "val" / JPEG)
    with pytest.raises(ValueError, match=r"^data.root: .*/val has no class folders; accepted"):
        folder(tmp_path)


def test_no_torch_and_no_dali_to_find_the_data() -> None:
    code = (
        "import sys; import ddp_ssl.data.datasets.registry, ddp_ssl.data.loading.order; "
        "sys.exit('torch' in sys.modules or 'nvidia.dali' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
