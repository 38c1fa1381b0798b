"""A recipe from outside the package: the example of docs/data.md, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from ddp_ssl.config.views import ViewGroup, views_of
from ddp_ssl.errors import ConfigError
from ddp_ssl.resume import arguments_of
from ddp_ssl.run.configure import load
from tests.data.images import array_of, folder_of, loader_of, same, through_a_file
from tests.runs import ROOT

VIEWS = views_of([ViewGroup(size=16, recipe="mine:erased"), ViewGroup(count=1, size=8)])


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module of docs/data.md."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "def erased" in block)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    file = tmp_path / "mine.py"
    file.write_text(example)
    return file


@pytest.mark.parametrize("kind", ["files", "array"])
def test_the_example_of_the_documentation(mine: Path, tmp_path: Path, kind: str) -> None:
    """Two processes draw other views, a resumed one the same, and a changed function is noticed."""
    split = folder_of(tmp_path / "images", 20) if kind == "files" else array_of(20)
    going = loader_of(split, VIEWS, mean=(0, 0, 0), std=(1, 1, 1))
    batch = next(going)
    assert [view.shape[2] for view in batch.views] == [16, 16, 8]
    holes = [(view == 0).all(1).sum((1, 2)) == 16 for view in batch.views[:2]]  # 4 x 4 pixels
    assert 0 < sum(int(hole.sum()) for hole in holes) < 12
    assert not torch.equal(*batch.views[:2])
    resumed = loader_of(split, VIEWS, prefetch=3, mean=(0, 0, 0), std=(1, 1, 1))
    state = through_a_file(going.state())
    assert resumed.load_state(state, 1) is None
    assert all(same(next(going), next(resumed)) for _ in range(3))
    mine.write_text(mine.read_text().replace("0.75", "0.7"))
    del sys.modules["mine"]
    changed = loader_of(split, VIEWS, mean=(0, 0, 0), std=(1, 1, 1)).load_state(state, 1)
    assert "recipes" in str(changed)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "cannot import the recipe mine:erased: .*no attribute 'erased'.*PYTHONPATH is acc"),
        ("erased = 3", "the recipe mine:erased is not a function; a function"),
        (
            "def erased(images, view, seed):\n    return images",
            r"images of \[72, 64, 3\]; \[16, 16",
        ),
        (
            "def erased(images, view, seed):\n    return imges",
            "NameError: .*imges.*mine.py, line 2",
        ),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_line(mine: Path, code: str, said: str) -> None:
    mine.write_text(code)
    with pytest.raises(ConfigError, match=f"^data.views: .*{said}"):
        loader_of(array_of(6), VIEWS)


def test_a_recipe_of_a_foreign_folder_is_imported_with_consent(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data: {views: [{recipe: 'stranger:function'}]}")
    assert load([str(config)]).config.data.views[0].recipe == "stranger:function"
    for refused in (lambda: load([str(config)], ""), lambda: arguments_of([str(tmp_path)])):
        with pytest.raises(ConfigError, match=r"stranger:function would be imported from outside"):
            refused()
    assert arguments_of([str(tmp_path), "--trust"])
