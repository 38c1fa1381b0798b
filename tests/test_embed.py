"""Features as files: right ones, in order, the same at any number of processes."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddp_ssl import embed, export
from ddp_ssl.config import NORMALISATION
from ddp_ssl.config.views import CentralCrop
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.formats import PixelFormat
from ddp_ssl.data.loading.loader import EvalLoader
from ddp_ssl.data.loading.settings import LoaderSettings
from ddp_ssl.evals import embedding
from ddp_ssl.methods.base import Method
from ddp_ssl.run.configure import load
from tests.exports import run_folder
from tests.ranks import Ranks

QUIET = ("run.device=cpu", "run.threads=1")


@pytest.fixture(scope="module")
def run(
    photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Method[Any], Dataset]:
    """A run on the 48 photos, 14 of them for validation, and its data."""
    overrides = [
        "data.name=folder", f"data.root={photos}", "data.val_fraction=0.3",
        "data.views=[{size: 24}]", "model.backbone_args={channels: [8, 8, 16, 16]}",
        "eval.batch_size=4",
    ]  # fmt: skip
    place, method = run_folder(tmp_path_factory.mktemp("embed") / "run", *overrides)
    return place, method, registry.load(load([str(place / "config.yaml")]).config.data, 0)


def launched(*arguments: str) -> int:
    """Runs in a rank process."""
    return embed.main(list(arguments))


def images_of(split: Any) -> torch.Tensor:
    """The photos as the evaluation sees them, all at once."""
    (batch,) = EvalLoader(
        split,
        np.arange(len(split)),
        CentralCrop(24, 24),
        LoaderSettings(PixelFormat(*NORMALISATION["imagenet"]), torch.device("cpu"), 1, 1),
        batch_size=len(split),
    )
    return batch.views[0].clone()


def test_the_features_are_the_methods(
    run: tuple[Path, Method[Any], Dataset], tmp_path: Path
) -> None:
    place, method, data = run
    out = tmp_path / "new" / "val.npz"
    assert embed.main([str(place), "--embeddings", "--out", str(out), *QUIET]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["val.npz"]
    file = np.load(out)
    assert sorted(file) == [
        "about", "class_names", "ids", "labels", "paths", "r", "splits", "z",
    ]  # fmt: skip
    assert file["ids"].tolist() == list(range(14))
    assert file["labels"].tolist() == data.val.labels.tolist()
    assert file["class_names"].tolist() == ["class0", "class1", "class2", "class3"]
    with torch.no_grad():
        r, z = method.embed(images_of(data.val))
    assert file["r"].dtype == np.float32
    assert float(r.std(0).max()) > 0.1
    np.testing.assert_allclose(file["r"], r, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(file["z"], z, rtol=1e-5, atol=1e-5)
    about = json.loads(str(file["about"]))
    assert (about["split"], about["images"], about["step"]) == ("val", 14, 33)


def test_embeddings_beside_features_of_other_tokens(photos: Path, tmp_path: Path) -> None:
    """`r` is what is asked for; `z` is of the features that the run was trained with."""
    place, method = run_folder(
        tmp_path / "run", "data.name=folder", f"data.root={photos}", "data.val_fraction=0.3",
        "data.views=[{size: 24}]", "model.backbone=vit_tiny_patch16_224", "model.stem=standard",
        "model.backbone_args={img_size: 24, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    )  # fmt: skip
    split = registry.load(load([str(place / "config.yaml")]).config.data, 0).val
    with torch.no_grad():
        cls, z = method.embed(images_of(split))
        mean = method.backbone.forward_features(images_of(split))[:, 1:].mean(1)
    out = tmp_path / "val.npz"
    words = [str(place), "--embeddings", "--out", str(out), "model.features=both", *QUIET]
    assert embed.main(words) == 0
    file = np.load(out)
    np.testing.assert_allclose(file["r"], torch.cat([cls, mean], 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(file["z"], z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", ["npz", "csv", "parquet"])
def test_all_images_with_their_paths(
    ending: str, run: tuple[Path, Method[Any], Dataset], photos: Path, tmp_path: Path
) -> None:
    """Each row's features are those of the image at its path, by the lines that load the run."""
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    place, _, data = run
    out = tmp_path / f"all.{ending}"
    assert embed.main([str(place), "--split", "all", "--out", str(out), *QUIET]) == 0
    if ending == "npz":
        file = np.load(out)
        columns = {name: file[f"{name}s"] for name in ("path", "split", "label", "id")}
        rows = [{name: column[i] for name, column in columns.items()} for i in range(48)]
        r = file["r"]
    else:
        if ending == "csv":
            with open(out, newline="") as text:
                rows = [*csv.DictReader(text)]
        else:
            import pyarrow.parquet as parquet

            rows = parquet.read_table(out).to_pylist()
        r = np.array([[float(row[f"r{i}"]) for i in range(16)] for row in rows])
        assert [row["class"] for row in rows] == [Path(row["path"]).parent.name for row in rows]
    assert r.shape == (48, 16)
    assert sorted(str(row["path"]) for row in rows) == sorted(map(str, photos.glob("*/*.jpg")))
    assert [str(row["split"]) for row in rows] == ["train"] * 34 + ["val"] * 14
    assert [int(row["id"]) for row in rows] == [*range(34), *range(14)]
    labels = [*data.train.labels.tolist(), *data.val.labels.tolist()]
    assert [int(row["label"]) for row in rows] == labels
    exported, _ = export.export(str(place), "timm", tmp_path / "export")
    names: dict[str, Any] = {}
    with contextlib.chdir("/") if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        card = (exported.parent / "README.md").read_text()
        exec(card.partition("```python\n")[2].partition("```")[0], names)
        for i in range(0, 48, 6):
            image = Image.open(rows[i]["path"]).convert("RGB")
            with torch.no_grad():
                found = names["model"](names["transform"](image)[None])[0].numpy()
            # Decoders and resizing differ a little between PIL and DALI.
            distances = np.linalg.norm(r - found, axis=1) / np.linalg.norm(found)
            assert int(distances.argmin()) == i
            assert distances[i] < 0.1


@pytest.mark.parametrize("ending", ["npz", "csv", "parquet"])
def test_class_names_that_are_not_utf8_are_written_as_their_paths_are(
    ending: str, tmp_path: Path
) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    split = Split.of_files("/x", [b"caf\xe9/0.png"], np.array([0]))
    images = embedding._images({"val": split}, {"val": np.array([0])})
    out, names = tmp_path / f"x.{ending}", [os.fsdecode(b"caf\xe9")]
    embedding.write_features(out, {"r": np.ones((1, 2), np.float32)}, images, names, {})
    if ending == "npz":
        file = np.load(out)
        found = str(file["paths"][0]), str(file["class_names"][0])
    elif ending == "csv":
        with open(out, newline="", encoding="utf-8") as text:
            (row,) = csv.DictReader(text)
        found = row["path"], row["class"]
    else:
        import pyarrow.parquet as parquet

        (row,) = parquet.read_table(out).to_pylist()
        found = row["path"], row["class"]
    assert found == (r"/x/caf\xe9/0.png", r"caf\xe9")
    if ending == "npz":
        picture = torch.zeros(1, 3, 32, 32)
        embedding.write_projector(
            tmp_path / "p", {"r": np.ones((1, 2))}, names, np.array([0]), picture
        )
        assert r"caf\xe9" in (tmp_path / "p/00000/r/metadata.tsv").read_text()


def test_training_images_are_the_whole_splits_also_of_a_run_on_a_share_of_them(
    photos: Path, tmp_path: Path
) -> None:
    data = ("data.name=folder", f"data.root={photos}", "data.val_fraction=0.3")
    views = ("data.views=[{size: 24}]", "data.batch_size=4", "data.fraction=0.5")
    place, _ = run_folder(tmp_path / "run", *data, *views)
    out = tmp_path / "x.npz"
    assert embed.main([str(place), "--split", "train", "--out", str(out), *QUIET]) == 0
    assert np.load(out)["ids"].tolist() == list(range(34))


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same(
    size: int,
    run: tuple[Path, Method[Any], Dataset],
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    """34 training images, so shares differ; the others write nothing."""
    place, _, data = run
    one, many = tmp_path / "one.npz", tmp_path / "many.npz"
    arguments = [str(place), "--split", "train", *QUIET, "--out"]
    assert embed.main([*arguments, str(one)]) == 0
    assert ranks.launch(launched, size, *arguments, str(many)) == [0] * size
    expected, found = np.load(one), np.load(many)
    assert found["ids"].tolist() == list(range(34)) == expected["ids"].tolist()
    assert (found["labels"] == data.train.labels).all()
    np.testing.assert_allclose(found["r"], expected["r"], rtol=1e-5, atol=1e-6)
    assert found["r"].std(0).max() > 0.1


def test_rows_are_gathered_in_parts(
    run: tuple[Path, Method[Any], Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, _, _ = run
    files = []
    for chunk in (embedding.CHUNK, 5):
        monkeypatch.setattr(embedding, "CHUNK", chunk)
        files.append(tmp_path / f"{chunk}.npz")
        assert embed.main([str(place), "--out", str(files[-1]), *QUIET]) == 0
    a, b = (np.load(file) for file in files)
    assert (a["r"] == b["r"]).all()
    assert (a["ids"] == b["ids"]).all()


def test_images_without_a_label_and_bad_ones(
    run: tuple[Path, Method[Any], Dataset],
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(photos.glob("*/*.jpg"))[:10]:
        (flat / path.name).write_bytes(path.read_bytes())
    bad = sorted(flat.iterdir())[3]
    bad.write_bytes(b"no image")
    out = tmp_path / "x.npz"
    arguments = [str(run[0]), "--data", "folder", "--split", "train", "--out", str(out), *QUIET]
    assert embed.main([*arguments, f"data.root={flat}", "data.val_fraction=0.01"]) == 0
    file = np.load(out)
    assert (file["labels"] == -1).all()
    assert len(file["class_names"]) == 0
    assert 8 <= len(file["ids"]) == len(file["r"]) <= 9
    assert 3 not in file["ids"]


def test_the_projector_shows_the_right_pictures(
    run: tuple[Path, Method[Any], Dataset], tmp_path: Path
) -> None:
    place, _, data = run
    out, folder = tmp_path / "x.npz", tmp_path / "projector"
    arguments = [str(place), "--projector", str(folder), "--points", "6", "--out", str(out), *QUIET]
    assert embed.main(arguments) == 0
    config = (folder / "projector_config.pbtxt").read_text()
    assert config.count("embeddings {") == 1
    files = folder / "00000" / "r"
    header, *lines = (files / "metadata.tsv").read_text().splitlines()
    assert header == "class\tid"
    ids = [int(line.split("\t")[1]) for line in lines]
    assert len(ids) == 6
    assert ids == sorted(ids)
    assert [line.split("\t")[0] for line in lines] == [f"class{data.val.labels[i]}" for i in ids]
    tensors = np.loadtxt(files / "tensors.tsv", delimiter="\t")
    np.testing.assert_allclose(tensors, np.load(out)["r"][ids], rtol=1e-4, atol=1e-5)
    sprite = np.asarray(Image.open(files / "sprite.png").convert("RGB")) / 255.0
    assert sprite.shape == (96, 96, 3)  # three by three of 32 pixels
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    seen = images_of(data.val).permute(0, 2, 3, 1).numpy() * std + mean
    for position, i in enumerate(ids):
        row, column = divmod(position, 3)
        cell = sprite[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        distances = [np.abs(cell.mean((0, 1)) - image.mean((0, 1))).sum() for image in seen]
        assert int(np.argmin(distances)) == i
    assert embed.main(arguments) == 2  # the folder is not empty now


def test_weights_of_others(
    run: tuple[Path, Method[Any], Dataset], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.npz"
    arguments = ["timm:resnet18", "--data", "folder", f"data.root={photos}", "--out", str(out)]
    extra = ["data.views=[{size: 32}]", *QUIET]
    assert embed.main([*arguments, *extra]) == 0
    assert np.load(out)["r"].shape[1] == 512


def test_what_cannot_be_done_is_one_line(
    run: tuple[Path, Method[Any], Dataset],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = str(run[0])
    text = tmp_path / "text.txt"
    text.write_text("x")
    ruined, taken = tmp_path / "ruined", tmp_path / "taken.npz"
    ruined.mkdir()
    taken.mkdir()
    for i in range(4):
        (ruined / f"{i}.jpg").write_bytes(b"no image")
    out = ["--out", str(tmp_path / "x.npz"), *QUIET]
    folder = ["--data", "folder", f"data.root={photos}"]
    cases: list[tuple[list[str], str]] = [
        (
            [place],
            "nowhere to write to: --out (FILE.npz, FILE.csv, FILE.parquet) or --projector DIR is",
        ),
        ([place, "--out", "x.npy"], "--out: x.npy does not end in .npz, .csv, .parquet"),
        ([place, "--split", "test", *out], "argument --split: invalid choice: 'test'"),
        ([place, "--points", "1", *out], "--points: 1 given; 2 to 65536 are accepted"),
        ([place, "--projector", str(text)], f"--projector: {text} is not empty"),
        ([place, "--projector", str(tmp_path)], f"--projector: {tmp_path} is not empty"),
        ([place, "more", *out], "more: unknown word; what comes after SOURCE is key=value"),
        ([place, *out, "optim.lr=1"], "optim"),
        (["nowhere", *out], "nowhere does not exist"),
        ([place, *out, "--data", "cifar"], "data.name: unknown data set 'cifar'; did you mean"),
        ([place, "--out", str(taken), *QUIET], "taken.npz: Is a directory"),
        (
            [place, "--data", "folder", f"data.root={ruined}", "--split", "train", *out],
            "data.name: none of the 3 train images can be read",
        ),
        ([place, "--out", f"{text}/x.npz", *QUIET], f"--out: {text} cannot be created"),
        (
            ["timm:resnet18", "--embeddings", *folder, *out, "data.views=[{size: 32}]"],
            "--embeddings: these weights have no projection head",
        ),
    ]
    for arguments, message in cases:
        assert embed.main(arguments) == 2, arguments
        err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(err) == 1
        assert err[0].startswith("ddp_ssl: error: ")
        assert message in err[0]
    assert not (tmp_path / "x.npz").exists()
