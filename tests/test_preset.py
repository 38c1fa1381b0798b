"""A folder of images alone: what it is, the preset for it, and the choices with their reasons."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddp_ssl.config import ConfigError
from ddp_ssl.config.files import PRESETS, config_names
from ddp_ssl.data import recognise
from ddp_ssl.distributed import World
from ddp_ssl.methods._registry import builtin_methods
from ddp_ssl.run import preset
from ddp_ssl.run.configure import load
from ddp_ssl.training.build import agree
from ddp_ssl.utils.launcher import has_bf16
from tests.data.images import pack
from tests.data.tables import as_parquet
from tests.helpers import SHALLOW
from tests.ranks import Ranks
from tests.runs import rows, train

CPU, GPU = "run.device=cpu", "run.device=cuda"


@pytest.fixture(autouse=True)
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with bf16, whatever this one has."""
    monkeypatch.setattr(preset, "has_bf16", lambda: True)


def picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)


def large(root: Path, files: int, side: int = 300) -> Path:
    for number in range(files):
        picture(root / f"class{number % 2}/{number}.png", side, side)
    return root


def chosen(*words: str) -> dict[str, str]:
    """The lines about choices, by key."""
    _, *lines = load(words).notes
    return dict(line.split("=", 1) for line in lines)


def test_a_folder_alone_gets_a_preset_and_a_line_for_each_choice(photos: Path) -> None:
    resolved = load([str(photos), CPU])
    config, origins = resolved.config, resolved.origins
    assert resolved.notes == (  # the preset's own values serve 100 epochs
        f"{photos}: 43 images in 4 folders to train on, about 22 pixels a side: preset/32",
        "data.batch_size=4: 43 images: at least 8 steps an epoch",
        "optim.lr=0.064: AdamW's peak stays 0.001 with 4 images a step",
    )
    assert (config.data.name, config.data.root) == ("folder", str(photos))
    assert (config.data.batch_size, config.optim.lr, config.optim.epochs) == (4, 0.064, 100)
    assert config.model.stem == "small"
    assert origins["data.name"] == "by the files that are there"
    assert origins["data.batch_size"] == "43 images: at least 8 steps an epoch"
    assert origins["model.stem"] == str(PRESETS / "32.yaml")
    text = resolved.to_yaml()
    assert text.startswith(f"# {photos}: 43 images")
    assert re.search("batch_size: 4 +# 43 images: at least 8 steps", text)
    assert load([f"data.root={photos}", CPU]).to_yaml() == text


def test_typed_keys_are_left_alone_and_others_follow_them(photos: Path) -> None:
    lines = chosen(str(photos), CPU, "data.batch_size=8", "optim.epochs=40")
    assert lines == {
        "optim.lr": "0.032: AdamW's peak stays 0.001 with 8 images a step",
        "optim.warmup_epochs": "4.0: a tenth of 40 epochs",
        "method.alpha_every": "2: about 20 measurements of alpha",
    }
    resolved = load([str(photos), CPU, "optim.lr=0.5", "method.alpha_every=7", "data.name=folder"])
    assert (resolved.config.optim.lr, resolved.config.method.alpha_every) == (0.5, 7)
    assert resolved.origins["data.name"] == "command line"
    lars = load([str(photos), CPU, "optim.name=lars"])
    assert lars.config.optim.lr == 0.4
    assert lars.origins["optim.lr"] == "the recipe's rate; the preset's is for adamw"
    assert lars.config.optim.weight_decay == 1e-4
    assert lars.origins["optim.weight_decay"] == "the recipe's decay; the preset's is for adamw"
    words = [str(photos), CPU, "optim.name=sgd", "method.name=simsiam"]
    sgd = load(words).config.optim
    assert (sgd.lr, sgd.weight_decay) == (0.5, 1e-5)
    assert load([*words, "optim.weight_decay=0.3"]).config.optim.weight_decay == 0.3


def test_methods_for_which_the_preset_is_wrong_get_their_own(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = chosen(*(words := [str(photos), CPU, "method.name=simsiam"]))
    assert lines["optim.name"] == "sgd: with AdamW simsiam's embeddings collapse"
    assert lines["optim.lr"] == "0.5: the recipe's rate; the preset's is for adamw"
    assert load([*words, "optim.name=adamw"]).config.optim.lr == 0.064
    words = [str(photos), CPU, "method.name=dino"]
    few = load(words).config
    assert few.method.model_dump().items() >= preset.DINO.items()
    assert few.optim.name == "adamw"
    assert load([*words, "method.prototypes=64"]).config.method.prototypes == 64
    monkeypatch.setattr(preset, "SMALL", 5)
    assert load(words).config.method.prototypes == 4096


@pytest.mark.parametrize("side", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_goes_with_a_preset(photos: Path, side: Path) -> None:
    assert f"preset/{side.stem}" in config_names()
    for name in builtin_methods():
        config = load([f"preset/{side.stem}", f"method.name={name}"]).config
        assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == (
            "adamw", 1e-3, 1e-2
        )  # fmt: skip
        assert config.data.views[0].size == int(side.stem)
    assert "alpha_every" not in str(load([str(photos), "method.name=simclr", CPU]).notes[2:])


def test_the_preset_goes_by_size_number_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(large(tmp_path / "large", 20))
    assert "preset/64 (no GPU, 64 pixels at most)" in load([place, CPU]).notes[0]
    assert "preset/128 (fewer than 5000 images)" in load([place, GPU]).notes[0]
    monkeypatch.setattr(preset, "FEW", 5)
    lines = chosen(place, GPU)
    assert "preset/224" in load([place, GPU]).notes[0]
    assert lines["model.backbone"] == "resnet18: fewer than 20000 images"
    assert lines["optim.epochs"] == "1000: 9 steps an epoch: 9000 steps"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert chosen(place, GPU)["data.batch_size"].startswith("6: ")
    monkeypatch.setattr(preset, "SMALL", 5)
    assert "model.backbone" not in chosen(place, GPU)


def test_what_was_counted_in_part_is_told_as_a_lower_bound(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognise, "MOST", 40)
    note = load([str(photos), CPU]).notes[0]
    assert ": at least 36 images in at least 4 folders to train on" in note
    lines = chosen(str(photos), CPU)
    assert lines["data.batch_size"] == "4: at least 36 images: at least 8 steps an epoch"
    assert lines["optim.epochs"] == "112: at least 36 images, on a CPU; more learn more"
    assert chosen(str(photos), GPU)["optim.epochs"] == "1000: at least 36 images"
    file = tmp_path / "images.txt"
    file.write_text("".join(f"{path}\n\n" for path in sorted(photos.rglob("*.jpg"))))
    assert ": at least 18 images in a list to" in load([str(file), CPU]).notes[0]


def test_too_few_images_for_the_processes_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "21")
    lines = chosen(str(photos), GPU)
    assert lines["data.batch_size"] == "42: 21 processes"
    assert lines["optim.epochs"] == "1000: 1 step an epoch: 1000 steps"
    monkeypatch.setenv("WORLD_SIZE", "64")
    said = "^data.batch_size: 43 images to train on, and a step takes at least 2 for each of 64 "
    with pytest.raises(ConfigError, match=said + "processes; accepted: at most 21 processes, or m"):
        load([str(photos), GPU])
    assert "data.batch_size" not in chosen(str(photos), GPU, "data.batch_size=128")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("train/a/0.png", "train/a/1.png", "val/a/0.png"):
        picture(tmp_path / "two" / name, 9, 9)
    resolved = load([str(tmp_path / "two"), CPU])
    assert ": 2 images in 1 folder to train on" in resolved.notes[0]
    assert resolved.origins["data.batch_size"] == "few images"
    (tmp_path / "two/train/a/1.png").unlink()
    assert ": 1 image in 1 folder to train on" in load([str(tmp_path / "two"), CPU]).notes[0]


def test_what_cannot_be_read_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.scandir

    def closed(folder: bytes) -> Any:
        if folder.endswith(b"class3/"):  # behind the first image, which `find` looks for
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return whole(folder)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", closed)
        with pytest.raises(ConfigError, match=r"^data\.root: .*class3/? cannot be read: Perm"):
            load([str(photos), CPU])
    file = tmp_path / "images.txt"
    file.write_text("a.png\n")

    def broken(file: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(file))

    with monkeypatch.context() as patched:
        patched.setattr(recognise, "opened", broken)
        with pytest.raises(ConfigError, match=r"^data\.files: .*images.txt cannot be read: Inp"):
            load([str(file), CPU])
    # A list in UTF-16 has names that no file system takes.
    for encoding in ("utf-8", "utf-16"):
        file.write_text("a.png\n", encoding=encoding)
        with pytest.raises(ConfigError, match=r"^data\.files: .*images.txt: none of its first fil"):
            load([str(file), CPU])
    # What a clone without Git LFS leaves.
    pointer = tmp_path / "lfs" / "0.jpg"
    pointer.parent.mkdir()
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match=r"^data\.root: none of 1 file is .*'version .* JPEG, "):
        load([str(pointer.parent), CPU])
    shutil.copy(photos / "class0" / "00.jpg", pointer.with_name("1.jpg"))
    assert ": 1 image without classes" in load([str(pointer.parent), CPU]).notes[0]


def test_a_cpu_without_bf16_computes_in_fp32(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    info = tmp_path / "cpuinfo"
    for text, native in {
        "processor: 0\nflags\t\t: fpu avx512f avx512_bf16\n": True,
        "processor: 0\nflags\t\t: fpu avx2 avx512f\n": False,
        "Features\t: fp asimd bf16\n": True,
        "": False,
    }.items():
        info.write_text(text)
        assert has_bf16(info) is native
    monkeypatch.setattr(preset, "has_bf16", lambda: False)
    line = "fp32: this CPU has no instructions for bf16"
    assert chosen(str(photos), CPU)["optim.precision"] == line
    assert "optim.precision" not in chosen(str(photos), GPU)
    assert "optim.precision" not in chosen(str(photos), CPU, "optim.precision=bf16")


def cifar(root: Path) -> None:
    (root / "cifar-10-batches-py").mkdir(parents=True)
    (root / "cifar-10-batches-py/data_batch_1").touch()


def blood(root: Path) -> None:
    root.mkdir()
    (root / "bloodmnist_64.npz").touch()


def tiny_imagenet(root: Path) -> None:
    for name in ("train/n1/images", "val/images"):
        (root / name).mkdir(parents=True)
    (root / "val/val_annotations.txt").touch()


@pytest.mark.parametrize(
    ("make", "name", "side"), [(cifar, "cifar10", 32), (blood, "blood", 64),
                               (tiny_imagenet, "tiny_imagenet", 64)]
)  # fmt: skip
def test_published_data_are_known_by_their_files(
    tmp_path: Path, make: Any, name: str, side: int
) -> None:
    make(tmp_path / "data")
    resolved = load([str(tmp_path / "data"), CPU])
    assert resolved.config.data.name == name
    assert resolved.config.data.views[0].size == side
    images = recognise.KNOWN[name][1]
    assert f": {min(images, 100_000)}" in resolved.notes[0]
    assert resolved.config.optim.epochs == -(-1000 // (images // 64))


def test_shards_and_lists_are_known_too(photos: Path, tmp_path: Path) -> None:
    assert pack(photos, tmp_path / "shards") == 0
    config = load([str(tmp_path / "shards"), CPU]).config
    assert (config.data.name, config.data.batch_size) == ("folder", 4)
    assert ": 43 images in shards to train on" in load([str(tmp_path / "shards"), CPU]).notes[0]
    names = [path.relative_to(photos) for path in sorted(photos.rglob("*.jpg"))]
    file = tmp_path / "images.csv"
    file.write_text("".join(f"{name},{name.parts[0]}\n" for name in names))
    resolved = load([str(file), f"data.root={photos}", CPU])
    assert (resolved.config.data.name, resolved.config.data.files) == ("list", str(file))
    assert resolved.notes[0].endswith("43 images in a list to train on, about 22 pixels a side: "
                                      "preset/32")  # fmt: skip


def test_parquet_files_are_known_by_their_rows(photos: Path, tmp_path: Path) -> None:
    as_parquet(photos, tmp_path / "hub")
    resolved = load([str(tmp_path / "hub"), CPU])
    assert (resolved.config.data.name, resolved.config.data.batch_size) == ("folder", 4)
    assert resolved.notes[0].endswith(
        "43 images in parquet files to train on, about 22 pixels a side: preset/32"
    )


def test_what_holds_no_images_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    both = tmp_path / "both"
    cifar(both)
    (both / "cifar-100-python").mkdir()
    (both / "cifar-100-python/train").touch()
    empty = str(tmp_path / "empty")
    run = tmp_path / "a run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "views.png"):
        (run / name).touch()
    for words, said in {
        (empty,): r"^data\.root: .*empty has no images",
        (empty, str(both)): r"both: one data\.root is accepted, and one is given already",
        ("data.root=nowhere",): r"^data\.root: .*nowhere does not exist",
        (str(both),): r"both holds cifar10 and cifar100; data\.name=cifar10 chooses one",
        (str(run),): "a run: the folder of a run; ddp-ssl resume '.*/a run' goes on with it$",
        (empty, "optim.epoch=3"): r"^optim\.epoch: unknown key; did you mean optim\.epochs",
        ("nowhere",): "^nowhere: no such file, .*, a folder of images, or key=value",
    }.items():
        with pytest.raises(ConfigError, match=said):
            load(words)


def test_the_digits_recipe_is_for_the_digits() -> None:
    assert load(["data.name=digits"]).origins["optim.lr"] == "embedded default"
    assert "embedded default" not in load(["data.name=cifar10", CPU]).origins.values()


def test_a_folder_alone_trains(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    words = [str(photos), CPU, f"run.dir={tmp_path / 'run'}", SHALLOW, "optim.epochs=1",
             "optim.precision=fp32", "run.threads=1", "log.tensorboard=false"]  # fmt: skip
    assert ranks.launch(train, 1, words) == [0]
    assert [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row] == [*range(1, 11)]
    head = (tmp_path / "run/config.yaml").read_text().splitlines()
    assert head[0] == f"# {load(words).notes[0]}"


def disagreeing(world: World) -> str:
    with pytest.raises(ConfigError) as caught:
        agree(load([f"optim.lr={0.1 * (1 + world.rank)}"]).config, world)
    agree(load([f"run.threads={world.rank + 1}"]).config, world)  # what is free may differ
    return str(caught.value)


def test_processes_that_chose_differently_are_refused(ranks: Ranks) -> None:
    said = ranks.run(disagreeing, 2)
    assert set(said) == {
        "optim.lr: 0.2 here and 0.1 on rank 0; one value for all processes is accepted, such as "
        "optim.lr=0.1 [rank 1]"
    }
