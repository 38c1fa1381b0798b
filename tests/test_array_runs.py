"""Whole runs on one's own arrays: as on files, resumed, evaluated, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddp_ssl import evaluate, export
from ddp_ssl.config import read_yaml
from tests.data.images import picture
from tests.ranks import Ranks
from tests.runs import BARE, arguments, rows, train

SIDE = 72  # larger than those that have a way of their own in memory
VIEWS = "data.views=[{count: 2, size: 16, recipe: sym, rotate: 90}]"
PLAIN = "data.views=[{count: 2, size: 16, rotate: 90, jitter_p: 0, gray_p: 0, solarize_p: 0}]"


def test_an_array_trains_as_the_same_images_as_files(ranks: Ranks, tmp_path: Path) -> None:
    """To the last bit, by two processes: each has other images than its neighbour."""
    x = np.stack([picture(i, SIDE, SIDE) for i in range(36)])
    for i, image in enumerate(x):
        file = tmp_path / f"files/{i % 3}/{i // 3:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    order = np.argsort(np.arange(36) % 3, kind="stable")
    np.savez(tmp_path / "a.npz", x=x[order], y=(np.arange(36) % 3)[order])
    form = ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.3, 0.3, 0.3]", VIEWS]
    seen = []
    for name, place in (("folder", "files"), ("array", "a.npz")):
        given = arguments(tmp_path / place, tmp_path / name, *BARE, *form, f"data.name={name}")
        assert ranks.launch(train, 2, given) == [0, 0]
        seen.append(rows(tmp_path / name))
    assert seen[0] == seen[1]


@pytest.fixture(scope="module")
def bands(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of two processes on 16-bit images of five channels, and its arguments."""
    root = tmp_path_factory.mktemp("bands")
    x = np.concatenate(
        [np.stack([picture(10 * i + k, 24, 20) for i in range(43)]) for k in (0, 5)], 3
    )
    np.save(root / "x.npy", x[..., :5].astype(np.uint16) * 250)
    np.save(root / "y.npy", np.arange(43) % 3)
    given = arguments(root, root / "run", *BARE, "data.name=array", PLAIN)
    assert ranks.launch(train, 2, given) == [0, 0]
    return root / "run", given


def test_channels_and_statistics_are_the_images(bands: tuple[Path, list[str]]) -> None:
    tree = read_yaml(bands[0] / "config.yaml")
    x = np.load(bands[0].parent / "x.npy").astype(np.float64).reshape(-1, 5)
    np.testing.assert_allclose(tree["data"]["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(tree["data"]["std"], x.std(0), rtol=1e-5)
    assert tree["model"]["backbone_args"]["in_chans"] == 5
    losses = [row["train/loss"] for row in rows(bands[0]) if "train/loss" in row]
    assert len(losses) == 9
    assert np.isfinite(losses).all()


def test_a_run_on_arrays_resumes_exactly(
    ranks: Ranks, bands: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, given = bands
    given = [f"run.dir={tmp_path}/run" if a.startswith("run.dir=") else a for a in given]
    ranks.launch(train, 2, given, 5)
    assert ranks.launch(train, 2, [*given, "run.resume=auto"]) == [0, 0]
    assert rows(tmp_path / "run") == rows(whole)


def test_weights_of_arrays_are_evaluated_and_exported(
    bands: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = bands
    given = ["run.device=cpu", "run.threads=1", f"run.dir={tmp_path}", "knn.k=[3]"]
    assert evaluate.main(["knn", str(folder), *given]) == 0
    assert evaluate.main(["knn", str(folder), *given, "data.name=digits", "data.root="]) == 2
    assert "5 numbers, and the images have 3 channels" in capsys.readouterr().err
    assert export.main([str(folder), "--format", "timm", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/README.md").read_text()
    lines = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(lines, names)
    x = torch.from_numpy(np.load(folder.parent / "x.npy")[0].astype(np.float32)).permute(2, 0, 1)
    features = names["model"](names["transform"](x)[None])
    assert features.isfinite().all()
    assert "in_chans=5" in lines
