"""Scanning folders, and kept scans: they are used, equal a new scan, and notice every change."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddp_ssl.data.datasets import cache, scan
from ddp_ssl.data.datasets.scan import images_below
from ddp_ssl.data.datasets.split import Split
from tests.data.images import write

OLD = time.time() - 3600  # older than what is taken to be racy


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept scans, also of small folders."""
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "WORTH_KEEPING", 1)
    scan.warn_once.cache_clear()
    return tmp_path / "cache" / "manifests"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were scanned rather than restored."""
    done: list[str] = []
    scan_all = scan._scan_all

    def counted(top: str, only: object) -> object:
        done.append(top)
        return scan_all(top, only)  # type: ignore[arg-type]

    monkeypatch.setattr(scan, "_scan_all", counted)
    return done


def tree(root: Path) -> Path:
    """Three classes, one of them nested; contents do not matter to a scan."""
    for name in ("a/1.jpg", "a/2.PNG", "b/x/3.jpg", "b/m.jpg", "b/y/z/4.webp", "c/5.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return age(root)


def age(root: Path) -> Path:
    """Make all folders old, so that their times are trusted."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (OLD, OLD))
    return root


def names(split: Split) -> list[str]:
    return [os.fsdecode(split.name(i)) for i in range(len(split))]


def fresh(split: Split) -> Split:
    """The same without a digest that was kept."""
    return Split(split.labels, split.root, split.names, split.spans)


def test_order_and_labels(tmp_path: Path, place: Path) -> None:
    split, classes = images_below(tree(tmp_path / "data"))
    assert classes == ("a", "b", "c")
    expected = ["a/1.jpg", "a/2.PNG", "b/m.jpg", "b/x/3.jpg", "b/y/z/4.webp", "c/5.jpg"]
    assert names(split) == expected
    assert split.labels.tolist() == [0, 0, 1, 1, 1, 2]
    one_by_one = [os.fsdecode(name) for name in scan.scan(os.fsencode(tmp_path / "data"))]
    assert one_by_one == expected


@pytest.mark.parametrize("only", [None, ["c", "a"]])
def test_restored_is_what_a_scan_finds(
    tmp_path: Path, place: Path, scans: list[str], only: list[str] | None
) -> None:
    root = tree(tmp_path / "data")
    images_below(root, only)
    split, classes = images_below(root, only)
    assert len(scans) == 1
    shutil.rmtree(place)
    again, same_classes = images_below(root, only)
    assert len(scans) == 2
    assert classes == same_classes == (("a", "b", "c") if only is None else ("a", "c"))
    for mine, other in ((split.labels, again.labels), (split.names, again.names)):
        assert np.array_equal(mine, other)  # type: ignore[arg-type]
    assert np.array_equal(split.spans, again.spans)  # type: ignore[arg-type]
    assert split.digest == fresh(split).digest == fresh(again).digest
    assert split.labels.base is not None  # mapped, not copied


def test_the_digest_kept_is_this_split_s_alone(tmp_path: Path, place: Path) -> None:
    root = tree(tmp_path / "data")
    images_below(root)
    split, _ = images_below(root)
    assert "digest" in split.__dict__  # not computed again
    part = split.subset(np.array([0, 1]))
    assert part.digest == fresh(part).digest != split.digest


def test_a_flat_folder_is_kept_too(tmp_path: Path, place: Path, scans: list[str]) -> None:
    (tmp_path / "data").mkdir()
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / "data" / name).touch()
    age(tmp_path / "data")
    for _ in range(2):
        split, classes = images_below(tmp_path / "data")
        assert (names(split), classes) == (["a.jpg", "b.jpg"], ())
        assert split.labels.tolist() == [-1, -1]
    assert len(scans) == 1


def test_small_folders_are_not_kept(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "WORTH_KEEPING", 7)
    images_below(tree(tmp_path / "data"))
    assert not place.exists()


# --- changes -------------------------------------------------------------------------------------


def add(root: Path) -> None:
    (root / "b" / "y" / "z" / "new.jpg").touch()


def remove(root: Path) -> None:
    (root / "a" / "1.jpg").unlink()


def rename(root: Path) -> None:
    (root / "c" / "5.jpg").rename(root / "c" / "6.jpg")


def add_class(root: Path) -> None:
    (root / "d").mkdir()
    (root / "d" / "1.jpg").touch()


def remove_class(root: Path) -> None:
    shutil.rmtree(root / "a")


def replace(root: Path) -> None:
    (root / "new").write_bytes(b"other")
    (root / "new").rename(root / "a" / "1.jpg")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (add, "b/y/z/"),
        (remove, "a/"),
        (rename, "c/"),
        (add_class, "the folder itself"),
        (remove_class, "the folder itself and 1 other folders"),
        (replace, "the folder itself and 1 other folders"),
    ],
)
def test_a_change_is_noticed(
    tmp_path: Path,
    place: Path,
    scans: list[str],
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
    where: str,
) -> None:
    root = tree(tmp_path / "data")
    images_below(root)
    change(root)
    with caplog.at_level(logging.INFO, "ddp_ssl"):
        split, _ = images_below(root)
    assert len(scans) == 2
    assert caplog.messages == [f"{root} has changed since it was last scanned: {where}"]
    found = [str(p.relative_to(root)) for p in root.rglob("*.*")]
    assert sorted(names(split)) == sorted(found)
    age(root)
    images_below(root)
    images_below(root)
    assert len(scans) == 3  # once more because the folders had another time, then kept


def test_files_rewritten_in_place_are_noticed(
    tmp_path: Path, place: Path, scans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(tmp_path / "data")
    images_below(root)
    with (root / "a" / "1.jpg").open("r+b") as file:
        file.write(b"12345678")
    with caplog.at_level(logging.INFO, "ddp_ssl"):
        images_below(root)
    assert "1 of 6 files looked at were rewritten, such as" in caplog.text
    assert "a/1.jpg" in caplog.text
    images_below(root)
    assert len(scans) == 2


def test_a_folder_that_was_just_changed_is_not_trusted(
    tmp_path: Path, place: Path, scans: list[str]
) -> None:
    """Within a clock tick a second change would not show."""
    root = tree(tmp_path / "data")
    os.utime(root / "a")
    images_below(root)
    status = os.stat(root / "a")
    (root / "a" / "late.jpg").touch()
    os.utime(root / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    split, _ = images_below(root)
    assert len(scans) == 2
    assert "a/late.jpg" in names(split)


def test_one_scan_and_one_old_one_for_a_folder(tmp_path: Path, place: Path) -> None:
    root = tree(tmp_path / "data")
    for i in range(4):
        (root / "a" / f"{i}{i}.jpg").touch()
        os.utime(root / "a", (OLD + i, OLD + i))
        mapped, _ = images_below(root)
    assert sorted(path.suffix for path in place.iterdir()) == ["", ".old"]
    assert len(mapped) == 10


def test_a_scan_in_use_outlives_its_replacement(tmp_path: Path, place: Path) -> None:
    root = tree(tmp_path / "data")
    images_below(root)
    split, _ = images_below(root)
    before = names(split)
    add(root)
    images_below(root)
    assert names(split) == before


def test_of_two_that_scan_at_once_the_first_is_kept(tmp_path: Path, place: Path) -> None:
    root = tree(tmp_path / "data")
    images_below(root)
    add(root)
    (key,) = place.iterdir()
    stale = scan._restore(key, str(root))
    assert isinstance(stale, scan._Stale)
    images_below(root)
    newer = (key / "manifest.json").read_text()
    found = scan._keep(key, str(root), scan._scan_all(str(root), None), stale)
    assert found is not None
    assert (key / "manifest.json").read_text() == newer


# --- damage --------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("file", [*scan.ARRAYS, "missing", "empty"])
def test_a_damaged_scan_is_made_again(
    tmp_path: Path, place: Path, scans: list[str], file: str
) -> None:
    root = tree(tmp_path / "data")
    before, _ = images_below(root)
    (key,) = place.iterdir()
    if file == "missing":
        (key / "spans.npy").unlink()
    elif file == "empty":
        (key / "labels.npy").write_bytes(b"")
    else:
        cut(key / f"{file}.npy")
    after, _ = images_below(root)
    assert len(scans) == 2
    assert after.digest == before.digest
    images_below(root)
    assert len(scans) == 2


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"token": 1}', "\xff"])
def test_damaged_json(tmp_path: Path, place: Path, scans: list[str], text: str) -> None:
    root = tree(tmp_path / "data")
    images_below(root)
    (key,) = place.iterdir()
    (key / "manifest.json").write_bytes(text.encode("latin-1"))
    images_below(root)
    images_below(root)
    assert len(scans) == 2
    assert json.loads((key / "manifest.json").read_text())["folder"] == str(root)


def test_a_cache_that_cannot_be_written_is_one_warning(
    tmp_path: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path / "file"))
    for root in (tmp_path / "one", tmp_path / "two"):
        split, _ = images_below(tree(root))
        assert len(split) == 6
        assert split.digest == fresh(split).digest
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith(f"DDP_SSL_CACHE: {tmp_path / 'file'} cannot be written")


def test_half_written_folders_of_dead_processes_go(tmp_path: Path) -> None:
    for name, at in ((".made-dead", OLD - cache.STALE), (".made-busy", OLD)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (at, at))
    for _ in range(2):
        cache.write_atomically(tmp_path / "made", lambda to: (to / "x").touch(), lambda: True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made-busy", "made", "made.old"]


# --- odd folders ---------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_read(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path / "data")
    scandir = os.scandir

    def refused(path: bytes) -> object:  # the tests may run as root, who may read everything
        if path.endswith(b"b/x/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    message = rf"^data.root: {root}/b/x/ cannot be read: Permission denied; accepted: "
    with pytest.raises(ValueError, match=message) as caught:
        images_below(root)
    assert "\n" not in str(caught.value)


def test_links_and_hidden_files(tmp_path: Path, place: Path) -> None:
    root = tree(tmp_path / "data")
    (root / "a" / "up").symlink_to(root)
    (root / "latest").symlink_to(root)
    (root / "a" / "itself.jpg").symlink_to(root / "a" / "itself.jpg")
    (root / "a" / "nowhere.jpg").symlink_to(root / "none.jpg")
    (root / "a" / ".hidden.jpg").touch()
    (root / "e").symlink_to(root / "b" / "y")
    split, classes = images_below(root)
    assert classes == ("a", "b", "c", "e")
    assert names(split)[-1] == "e/z/4.webp"
    assert len(split) == 7


def test_images_beside_class_folders_are_told_of(
    tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(tmp_path / "data")
    for i in range(3):
        (root / f"{i}.jpg").touch()
    age(root)
    for _ in range(2):  # found, then restored
        split, _ = images_below(root)
    assert len(split) == 6
    assert caplog.messages == [
        f"{root}: 3 images lie beside the class folders and are left out, having no class"
    ]
    scan.warn_once.cache_clear()
    images_below(root)
    assert len(caplog.messages) == 2


def test_long_scans_show_progress(
    tmp_path: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(scan, "EVERY_S", 0.0)
    monkeypatch.setattr(scan, "WORTH_SAYING", 0.0)
    root = tree(tmp_path / "data")
    with caplog.at_level(logging.INFO, "ddp_ssl"):
        images_below(root)
    assert f"scanning {root}: 3 of 6 folders, 3 images, 0 s" in caplog.messages
    assert caplog.messages[-1].startswith(f"scanned {root}: 6 images in 7 folders, 0.")


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    """Each is seen once in each other one, by whatever way, and never below itself."""
    for name in "abc":
        write(tmp_path / "top" / name / "0.jpg")
        for other in set("abc") - {name}:
            (tmp_path / "top" / name / f"to_{other}").symlink_to(f"../{other}")
    split, classes = images_below(tmp_path / "top")
    assert classes == ("a", "b", "c")
    names = [split.name(i).decode() for i in range(len(split))]
    assert [name for name in names if name.startswith("a/")] == [
        "a/0.jpg",
        "a/to_b/0.jpg", "a/to_b/to_c/0.jpg", "a/to_c/0.jpg", "a/to_c/to_b/0.jpg",
    ]  # fmt: skip
    assert len(names) == 15
