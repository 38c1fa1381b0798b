"""`data.root=[A, B]`: two folders as one data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddp_ssl.commands import check_data, pack_shards
from ddp_ssl.config import ConfigError
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.resume import arguments_of
from ddp_ssl.run.configure import load
from tests.data.images import write

CLASSES = {"007": ("cat", "dog"), "b": ("ant", "dog")}


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """Five images in each class of each root, all different."""
    number = 0
    for root, classes in CLASSES.items():
        for name in classes:
            for i in range(5):
                write(tmp_path / "here" / root / name / f"{i}.png", number := number + 1)
    return tmp_path / "here"


def both(folder: Path, *changes: str, data: str = "") -> Dataset:
    given = data or f"[{folder}/007, {folder}/b]"
    return registry.load(load(["folder/adadim", f"data.root={given}", *changes]).config.data, 0)


def test_two_roots_are_one_after_the_other(
    roots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(roots)
    data = both(roots, data="[007, b]")
    assert data.class_names == ("cat", "dog", "ant")
    assert data.val is not None
    everything = {*map(data.train.where, range(18)), *map(data.val.where, range(2))}
    assert everything == {str(path) for path in roots.glob("*/*/*.png")}
    labels = [data.class_names.index(data.train.where(i).split("/")[-2]) for i in range(18)]
    assert data.train.labels.tolist() == labels
    for i in range(18):
        assert data.train.read(i).tobytes() == Path(data.train.where(i)).read_bytes()
    before = data.train.identity  # the place of a root is no part of it
    monkeypatch.chdir(roots.rename(tmp_path / "moved"))
    assert both(roots, data="[007, b]").train.identity == before
    assert both(roots, data="[b, 007]").train.identity != before


def test_validation_images_are_those_of_all_roots(roots: Path) -> None:
    for place in ("007/val/dog", "007/train/dog", "007/train/cat"):
        (roots / place).mkdir(parents=True)
        write(roots / place / "x.png", len(place))
    val = both(roots).val
    assert val is not None
    assert [val.where(i) for i in range(len(val))] == [f"{roots}/007/val/dog/x.png"]
    assert val.labels.tolist() == [1]


def test_lists_of_images_name_the_whole_path(roots: Path, tmp_path: Path) -> None:
    """A bad image is listed by its path, and left out in its own root alone."""
    bad, given = tmp_path / "bad.txt", f"data.root=[{roots}/007, {roots}/b]"
    (roots / "b/dog/3.png").write_bytes(b"no image")
    arguments = ["folder/adadim", given]
    assert check_data.main([*arguments, "--workers=2", f"--out={bad}"]) == 1
    assert bad.read_text().split("\t")[0] == f"{roots}/b/dog/3.png"
    data = both(roots, f"data.skip={bad}")
    assert data.val is not None
    left = {s.where(i) for s in (data.train, data.val) for i in range(len(s))}
    assert left == {str(path) for path in roots.glob("*/*/*.png")} - {f"{roots}/b/dog/3.png"}


def test_packed_roots_are_the_same_images(roots: Path, tmp_path: Path) -> None:
    given, out = f"data.root=[{roots}/007, {roots}/b]", tmp_path / "shards"
    assert pack_shards.main(["folder/adadim", given, "--out", str(out)]) == 0
    packed, files = both(roots, data=str(out)), both(roots)
    assert packed.class_names == files.class_names
    assert packed.train.identity == files.train.identity
    for i in range(18):
        assert packed.train.read(i).tobytes() == files.train.read(i).tobytes()
    inside = ["folder/adadim", given, "--out", f"{roots}/b/x"]
    assert pack_shards.main(inside) == 2


def test_what_cannot_be_used_is_named(roots: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^data.root: {roots}/nowhere does not exist"):
        both(roots, data=f"[{roots}/b, {roots}/nowhere]")
    (roots / "c").mkdir()
    (roots / "c/shards.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^data.root: {roots}/c is .* folders of image files"):
        both(roots, data=f"[{roots}/b, {roots}/c]")
    (roots / "link").symlink_to(roots / "b")
    with pytest.raises(ValueError, match=f"^data.root: {roots}/b is given 2 times; accepted: once"):
        both(roots, data=f"[{roots}/b, {roots}/link]")
    with pytest.raises(ValueError, match=r"^data.root: data.name=list takes one root; several"):
        both(roots, "data.name=list", data=f"[{roots}/b, {roots}/007]")
    with pytest.raises(ConfigError, match=r"a path or a list of paths is accepted, got \[\]"):
        both(roots, data="[]")


def test_a_run_folder_keeps_all_roots(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative ones are meant from where the run began."""
    (roots / "run").mkdir()
    (roots / "run/config.yaml").write_text("data: {name: folder, root: [007, b]}\n")
    (roots / "run/environment.json").write_text(f'{{"cwd": "{roots}"}}')
    monkeypatch.chdir("/")
    data = load(arguments_of([str(roots / "run")])).config.data
    assert data.roots == [f"{roots}/007", f"{roots}/b"]
    assert data.model_dump()["root"] == data.roots
