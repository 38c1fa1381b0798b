"""Exported backbones give the run's features without this package."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open

from ddp_ssl import export
from ddp_ssl.config import NORMALISATION
from ddp_ssl.methods.base import Method
from ddp_ssl.models import build_backbone, loading_snippet
from ddp_ssl.run.configure import load
from tests.exports import run_folder
from tests.helpers import config_of, relative

ROOT = Path(__file__).parent.parent
SMALL = ("model.backbone=resnet18", "model.stem=small", "data.views=[{size: 24}]")
PADDED = ("model.backbone=resnet18", "model.stem=small_pad2", "data.views=[{size: 24}]")
VIT = (
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={img_size: 32, patch_size: 8, depth: 2}",
    "data.views=[{size: 32}]",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Method[Any]]:
    return run_folder(tmp_path_factory.mktemp("small") / "run", *SMALL)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Method[Any]]:
    return run_folder(tmp_path_factory.mktemp("padded") / "run", *PADDED)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Method[Any]]:
    return run_folder(tmp_path_factory.mktemp("vit") / "run", *VIT)


@torch.no_grad()
def features_by_the_card(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """The features that the lines of the model card give in another folder."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    before = os.getcwd()
    os.chdir("/")
    try:
        exec(found[1], names)
    finally:
        os.chdir(before)
    picture = Image.new("RGB", (images.shape[-1] + 9, images.shape[-1]), (255, 0, 127))
    made = names["transform"](picture)
    assert made.shape == images.shape[1:]
    mean, std = (torch.tensor(values) for values in NORMALISATION["digits"])
    torch.testing.assert_close(made[:, 0, 0], (torch.tensor([1, 0, 127 / 255]) - mean) / std)
    return torch.as_tensor(names["model"](images))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("small", "timm"),
        ("small", "torchvision"),
        ("small", "onnx"),
        ("padded", "timm"),
        ("padded", "torchvision"),
        ("vit", "torchvision"),
        ("vit", "safetensors"),
        ("vit", "onnx"),
        ("vit", "hub"),
    ],
)
def test_features_are_the_runs(
    kind: str, form: export.Form, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run, method = request.getfixturevalue(kind)
    if (kind, form) == ("vit", "torchvision"):
        with pytest.raises(ValueError, match="torchvision has no vit_tiny_patch16_224 that"):
            export.export(str(run), form, tmp_path)
        return
    file, off = export.export(str(run), form, tmp_path / "out")
    files = ["README.md", *(["config.json"] if form == "hub" else []), export.FILES[form]]
    assert sorted(p.name for p in file.parent.iterdir()) == files
    size = 32 if kind == "vit" else 24
    images = torch.randn(7, 3, size, size)  # another number of images than at export
    with torch.no_grad():
        expected, _ = method.embed(images)
    found = features_by_the_card(file.parent, images)
    assert found.shape == expected.shape
    assert float(expected.std()) > 0.05
    assert relative(found, expected) < 2e-6
    assert off < 2e-6
    if form == "torchvision":
        theirs = torchvision.models.resnet18().state_dict()
        ours = torch.load(file, weights_only=True)
        assert ours.keys() == {name for name in theirs if not name.startswith("fc.")}
    if form == "onnx":
        session = onnxruntime.InferenceSession(file)
        assert session.get_modelmeta().custom_metadata_map["image_size"] == str(size)


@pytest.mark.parametrize(("stem", "first", "last"), [("small", 32, 4), ("small_pad2", 34, 5)])
def test_stems_of_small_images(stem: str, first: int, last: int) -> None:
    backbone, _ = build_backbone(
        config_of("model.backbone=resnet18", f"model.stem={stem}").model, [32]
    )
    seen = backbone.conv1(torch.zeros(1, 3, 32, 32))
    assert seen.shape[2:] == (first, first)
    assert backbone.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (last, last)


def test_the_card_says_what_it_is(small: tuple[Path, Method[Any]], tmp_path: Path) -> None:
    run, _ = small
    export.export(f"{run}:last", "safetensors", tmp_path)
    card = (tmp_path / "README.md").read_text()
    for text in (
        "# resnet18, adadim on digits",
        "timm `resnet18`, first convolution 3x3 with stride 1 and padding 1, no max-pool",
        "512 features; 11.17 M parameters",
        "digits (train images 0123456789ab)",
        "3 of 20 epochs, 33 steps of 128 images x 2 views on 2 processes",
        "| k-NN top-1 | 0.8125 |",
        "| effective rank of the features | 48.63 |",
        "ddp_ssl 0.1.0, commit abc",
        "`[n, 3, 24, 24]`, RGB, pixels in [0, 1], minus\n(0.5, 0.5, 0.5), divided by (0.25,",
        "  views: [{count: 2, size: 24, recipe: asym}]",
        "terms of the data set (digits)",
    ):
        assert text in card
    with safe_open(tmp_path / "backbone.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["stem"] == "small"
    assert json.loads(metadata["mean"]) == [0.5, 0.5, 0.5]
    assert f"`{metadata['config_hash'][:16]}`" in card


def test_the_default_place_and_a_checkpoint_by_name(
    vit: tuple[Path, Method[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = vit
    (saved,) = (run / "checkpoints").glob("*.pt")
    assert export.main([str(saved), "--format", "timm"]) == 0
    assert capsys.readouterr().out == (
        f"{run}/export/timm/backbone.pth, and README.md beside it; read back, its features are the "
        "checkpoint's to the last bit\n"
    )


def test_a_file_that_is_off_is_not_left(
    vit: tuple[Path, Method[Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoilt(trained: export.Trained, file: Path) -> export.Features:
        read_back = export.write_timm(trained, file)
        return lambda images: read_back(images) * 1.001

    monkeypatch.setitem(export.WRITERS, "timm", spoilt)
    assert export.main([str(vit[0]), "--format", "timm", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "ddp_ssl: error: features read back from the timm file are 1.0e-03 off (relative), more "
        "than 0.0001: it would not be what the run trained\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_one_line(
    small: tuple[Path, Method[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = small
    weights, text, empty = tmp_path / "weights.pt", tmp_path / "text.txt", tmp_path / "empty"
    torch.save({"conv1.weight": torch.zeros(1)}, weights)
    text.write_text("no checkpoint")
    empty.mkdir()
    narrow, _ = run_folder(tmp_path / "narrow", "model.backbone_args={channels: [8, 8, 16, 16]}")
    stray = narrow / "checkpoints" / "stray.pt"
    torch.save({"x": 1}, stray)
    cases: list[tuple[list[str], str]] = [
        ([str(run)], "--format (timm, torchvision, safetensors, onnx, hub) or --push"),
        ([str(run), "--format", "tf"], "argument --format: invalid choice: 'tf' (choose from"),
        (["nowhere", "--format", "timm"], "nowhere does not exist"),
        ([str(empty), "--format", "timm"], "no run folder (config.yaml is not there)"),
        ([str(weights), "--format", "timm"], "belongs to no run of ddp_ssl"),
        (["timm:resnet18", "--format", "timm"], "belongs to no run of ddp_ssl"),
        ([f"{run}:best", "--format", "timm"], "best.pt does not exist"),
        ([str(stray), "--format", "timm"], "is no checkpoint of a run"),
        ([str(run), "--format", "timm", "--out", str(text)], f"--out: {text} cannot be created"),
        ([str(narrow), "--format", "torchvision"], "(channels: [8, 8, 16, 16]), torchvision's is"),
    ]
    for arguments, message in cases:
        assert export.main(arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("ddp_ssl: error: ")
        assert message in err


def test_the_lines_that_load_fetch_no_weights_of_others() -> None:
    config = config_of("model.backbone_args={pretrained: true, drop_path_rate: 0.1}")
    lines = loading_snippet(config.model, config.data, Path("x.pt"))
    assert "drop_path_rate=0.1" in lines
    assert "pretrained" not in lines


def test_the_readme_shows_the_lines_that_a_run_prints() -> None:
    config = load(["preset/224", "data.root=DIR", "model.backbone=resnet18"]).config
    lines = loading_snippet(config.model, config.data, Path("/here/runs/NAME/backbone.pt"))
    shown = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    same = [ast.dump(ast.parse(text)) == ast.dump(ast.parse(lines)) for text in shown]
    assert any(same)
    comment = lines.splitlines()[-1]
    assert comment in shown[same.index(True)]


def test_only_a_card_of_ours_is_replaced(
    vit: tuple[Path, Method[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(vit[0]), "--format", "timm", "--out", str(tmp_path)]
    card = tmp_path / "README.md"
    card.write_text("# My project\n")
    assert export.main(arguments) == 2
    assert "README.md is no model card of an export" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert card.read_text() == "# My project\n"
    card.unlink()
    assert export.main(arguments) == export.main(arguments) == 0
