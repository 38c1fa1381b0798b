"""Models go to the Hugging Face hub and come back with the same features; a stand-in answers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load, save

from ddp_ssl import embed, evaluate, export, train
from ddp_ssl.config import NORMALISATION
from ddp_ssl.evals.pretrained import load_pretrained
from ddp_ssl.evals.settings import Backbone
from ddp_ssl.methods.base import Method
from ddp_ssl.utils import hub
from tests.exports import run_folder
from tests.helpers import config_of, method_of, relative
from tests.hub import TOKEN, Hub, serve
from tests.runs import arguments

NARROW = ("model.backbone_args={channels: [8, 8, 16, 16], drop_path_rate: 0.1}",)
VIT = (
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={img_size: 24, patch_size: 8, depth: 2}",
)
SIZE = ("data.views=[{size: 24}]", "data.val_resize=28")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Method[Any]]:
    return run_folder(tmp_path_factory.mktemp("narrow") / "run", *NARROW, *SIZE)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Method[Any]]:
    return run_folder(tmp_path_factory.mktemp("vit") / "run", *VIT, *SIZE)


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, to which this process's client is pointed as HF_ENDPOINT would."""
    with serve() as server:
        point_to(server.url, tmp_path / "home", monkeypatch)
        yield server


def point_to(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents"), raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.answers.cache_clear()


@torch.no_grad()
def features(model: Any, size: int = 24) -> torch.Tensor:
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(2))
    return torch.as_tensor(model(images))


@torch.no_grad()
def of_run(method: Method[Any]) -> torch.Tensor:
    return features(lambda images: method.embed(images)[0])


def push(run: Path, out: Path, name: str = "me/net") -> None:
    assert export.main([str(run), "--push", name, "--out", str(out)]) == 0


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("ddp_ssl: error: ")
    return err


@pytest.mark.parametrize("kind", ["narrow", "vit"])
def test_timm_loads_what_was_pushed(
    kind: str, standin: Hub, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run, method = request.getfixturevalue(kind)
    push(run, tmp_path / "out")
    files = standin.repositories["me/net"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model("hf-hub:me/net", pretrained=True)
    expected = of_run(method)
    assert float(expected.std()) > 0.05
    assert torch.equal(features(model.eval()), expected)
    # The images are prepared as the run prepares them: 28 pixels, the middle 24.
    mean, std = NORMALISATION["digits"]
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = Image.effect_noise((28, 28), 90).convert("RGB")
    there = (torch.tensor(pixels.getpixel((2, 2))) / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(prepare(pixels)[:, 0, 0], there)
    # A classifier can be put on it.
    assert timm.create_model("hf-hub:me/net", pretrained=True, num_classes=3).num_classes == 3


def test_the_command_pushes_with_a_card_and_keeps_no_token(
    narrow: tuple[Path, Method[Any]], standin: Hub, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(narrow[0], run)
    variables = {"HF_ENDPOINT": standin.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-m", "ddp_ssl.export", str(run), "--format", "timm", "--push", "me/net"],
        env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{run}/export/hub/model.safetensors, and README.md beside it; read back, its features are "
        "the checkpoint's to the last bit\n"
        "pushed: timm.create_model('hf-hub:me/net', pretrained=True) loads it\n"
    )
    card = standin.repositories["me/net"]["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", "timm", "self-supervised-learning", "adadim"],
    }
    assert text.startswith("# resnet18, adadim on digits\n")
    assert "model = timm.create_model('hf-hub:me/net', pretrained=True)\n" in text
    assert str(tmp_path) not in card
    said = json.loads(standin.repositories["me/net"]["config.json"])
    assert said["model_args"] == {"channels": [8, 8, 16, 16]}  # what training alone needs is gone
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 5
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr


def test_the_hubs_weights_are_evaluated_as_the_runs(
    narrow: tuple[Path, Method[Any]], standin: Hub, tmp_path: Path
) -> None:
    push(narrow[0], tmp_path / "out")
    settings = ["run.device=cpu", "data.name=digits", "data.val_size=24", "data.val_resize=28"]
    rows = []
    for source, more in ((str(narrow[0]), []), ("hf-hub:me/net", settings)):
        place = [f"run.dir={tmp_path}", f"run.name=of{len(rows)}", "knn.k=5"]
        assert evaluate.main(["knn", source, *place, *more]) == 0
        written = json.loads((tmp_path / "evaluate" / f"of{len(rows)}.json").read_text())
        rows.append(written["rows"])
    assert rows[0] == rows[1]
    found = load_pretrained("hf-hub:me/net", Backbone(), [24])
    assert found.description == "timm's resnet18, weights of hf-hub:me/net"
    assert found.normalisation == NORMALISATION["digits"]
    assert "state_dict" not in found.backbone.pretrained_cfg  # type: ignore[operator]


def test_a_run_begins_with_the_hubs_weights_and_needs_no_hub_later(
    narrow: tuple[Path, Method[Any]],
    vit: tuple[Path, Method[Any]],
    photos: Path,
    standin: Hub,
    tmp_path: Path,
) -> None:
    push(narrow[0], tmp_path / "out")
    begun = "model.backbone_args={channels: [8, 8, 16, 16], pretrained: hf-hub:me/net}"
    method = method_of(config_of(begun, "method.name=byol"), dtype=torch.float32).eval()
    teacher: Any = method.momentum["backbone"]  # type: ignore[index]
    for network in (method.backbone, teacher):
        torch.testing.assert_close(features(network), of_run(narrow[1]))
    begun_vit = (VIT[0], "model.backbone_args={patch_size: 8, depth: 2, pretrained: hf-hub:me/vit}")
    push(vit[0], tmp_path / "vit", "me/vit")
    other = method_of(config_of(*begun_vit, *SIZE), dtype=torch.float32)  # without img_size
    assert features(other.backbone).shape == of_run(vit[1]).shape  # type: ignore[arg-type]
    words = [begun, "optim.lr=1e-9", "eval.every=0", "measure.every=0", "eval.raw_pixels=false"]
    words = arguments(photos, tmp_path / "run", *words, "optim.epochs=1")
    assert train.main(words) == 0
    weights = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    pushed = narrow[1].backbone.conv1.weight  # type: ignore[union-attr]
    assert relative(weights["conv1.weight"], pushed) < 0.1  # three small steps away
    shutil.rmtree(tmp_path / "home")
    standin.asked.clear()
    assert train.main([*words[:-1], "optim.epochs=2", "run.resume=auto"]) == 2  # another experiment
    assert train.main([*words, "run.resume=auto"]) == 0
    load_pretrained(tmp_path / "run")
    load_pretrained(tmp_path / "run" / "backbone.pt")
    assert standin.asked == []


class Code:
    """Code that would run if its pickle were trusted."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_no_code_of_the_hub_runs(
    narrow: tuple[Path, Method[Any]], standin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(narrow[0], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    files = standin.repositories["me/net"]
    weights = load(files.pop("model.safetensors"))
    torch.save(weights, tmp_path / "plain")
    files["pytorch_model.bin"] = (tmp_path / "plain").read_bytes()
    model = load_pretrained("hf-hub:me/net", Backbone(), [24]).backbone
    assert torch.equal(features(model), of_run(narrow[1]))  # a pickle of tensors alone is read
    torch.save(weights | {"x": Code()}, tmp_path / "planted")
    planted = (tmp_path / "planted").read_bytes()
    for name, said in (("pytorch_model.bin", {}), ("w.bin", {"hf_hub_filename": "w.bin"})):
        config = json.loads(files["config.json"])
        config["pretrained_cfg"] |= said | {"custom_load": "hf", "url": "x", "file": "planted"}
        standin.repositories["me/bad"] = {"config.json": json.dumps(config).encode(), name: planted}
        with pytest.raises(ValueError, match=r"^hf-hub:me/bad: its weights cannot be fetched: .*"):
            load_pretrained("hf-hub:me/bad", Backbone(), [24])
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(Code()).replace(b"executed", b"no/place"))  # it is code


def test_what_the_hub_does_not_have_is_one_line(
    narrow: tuple[Path, Method[Any]],
    standin: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(narrow[0], tmp_path / "out")
    files = standin.repositories["me/net"]
    config = json.loads(files["config.json"])
    weights = load(files["model.safetensors"])
    del weights["layer4.1.bn2.weight"]
    changed: dict[str, dict[str, bytes]] = {
        "me/part": {**files, "model.safetensors": save(weights)},
        "me/text": {**files, "config.json": b"no JSON"},
        "me/other": {"config.json": json.dumps({"model_type": "bert"}).encode()},
        "me/maps": {
            **files,
            "config.json": json.dumps(config | {"model_args": {"features_only": True}}).encode(),
        },
        "me/odd": {**files, "config.json": json.dumps(config | {"architecture": "os"}).encode()},
    }
    standin.repositories |= changed
    capsys.readouterr()
    cases = {
        "hf-hub:me/none": "hf-hub:me/none: no model of timm's can be fetched: ",
        "hf-hub:": "hf-hub:: no model of timm's can be fetched: ",
        "hf-hub:me/text": "hf-hub:me/text: no model of timm's can be fetched: Expecting value",
        "hf-hub:me/other": "hf-hub:me/other: no model of timm's can be fetched: KeyError: 'archi",
        "hf-hub:me/part": "Missing key(s) in state_dict: \"layer4.1.bn2.weight\"",
        "hf-hub:me/maps": "features_only is not accepted",
        "hf-hub:me/odd": "timm has no model 'os'",
    }  # fmt: skip
    for source, message in cases.items():
        assert evaluate.main(["knn", source, "data.name=digits", "run.device=cpu"]) == 2
        assert message in one_line(capsys)
    source = ["hf-hub:me/net", "data.name=digits", "model.stem=small", "run.device=cpu"]
    assert evaluate.main(["knn", *source]) == 2
    assert "model.stem: small has no weights in hf-hub:me/net; standard would" in one_line(capsys)
    for given, message in {
        "{pretrained: hf-hub:me/net}": "not what hf-hub:me/net was made with, {'channels': [8, 8",
        "{pretrained: me/net}": "pretrained: me/net given; true, for timm's own weights, or hf-hub",
    }.items():
        with pytest.raises(ValueError, match=r"^model.backbone_args: ") as refused:
            method_of(config_of(f"model.backbone_args={given}"))
        assert message in str(refused.value)
    with pytest.raises(ValueError, match=r"hf-hub:me/net is another one; resnet18 is accepted"):
        method_of(
            config_of("model.backbone=resnet34", "model.backbone_args={pretrained: hf-hub:me/net}")
        )
    with pytest.raises(ValueError, match=r"model.backbone_args=\{pretrained: hf-hub:me/net\} is"):
        config_of("run.init_from=hf-hub:me/net")


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_hub_that_does_not_answer_is_one_line_at_once(
    kind: str,
    narrow: tuple[Path, Method[Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Retries would take minutes: they would end the test by its limit of time."""
    monkeypatch.setattr(hub, "PATIENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # answers nobody
        if kind == "closed":
            listening.close()
            url = "http://127.0.0.1:9"
        else:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        point_to(url, tmp_path / "home", monkeypatch)
        out = tmp_path / "out"
        digits = ["data.name=digits", "run.device=cpu"]
        begun = "model.backbone_args={pretrained: hf-hub:me/net}"
        missing = f"hf-hub:me/net: no model of timm's can be fetched: {url} cannot be reached, and"
        for command, words, message in (
            (evaluate, ["knn", "hf-hub:me/net", *digits], missing),
            (embed, ["hf-hub:me/net", "--out", f"{out}.npz", *digits], missing),
            (train, [begun, f"run.dir={out}", "run.device=cpu"], missing),
            (export, [str(narrow[0]), "--push", "me/net", "--out", str(out)], f"--push: {url} can"),
        ):
            assert command.main(words) == 2
            assert message in one_line(capsys)
        assert not out.exists()


def test_what_cannot_be_pushed_is_one_line(
    narrow: tuple[Path, Method[Any]],
    standin: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = str(narrow[0]), tmp_path / "out"
    stem, _ = run_folder(tmp_path / "stem", *NARROW, *SIZE, "model.stem=small")
    hint = "model.stem=small again; timm and safetensors take any backbone"
    cases = {
        (run, "--push", "net"): "--push: net is no name on the hub; USER/NAME is accepted",
        (run, "--push", "hf-hub:me/net"): "--push: hf-hub:me/net is no name on the hub",
        (run, "--push", "me/net", "--format", "onnx"): "--push: --format onnx given; hub or none",
        (str(stem), "--push", "me/net"): hint,
        (str(stem), "--format", "hub"): hint,
    }
    for words, message in cases.items():
        assert export.main([*words, "--out", str(out)]) == 2
        assert message in one_line(capsys)
        assert not out.exists() or not list(out.iterdir())
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert export.main([run, "--push", "me/net", "--out", str(out)]) == 2
    said = one_line(capsys)
    assert said.startswith(f"ddp_ssl: error: --push: me/net on {standin.url}: ")
    assert "a token that may write there is accepted, in HF_TOKEN or from `hf auth login`" in said
    assert "hf_wrong" not in said
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["README.md", "config.json", "model.safetensors"]
    )  # complete, for another try
    assert standin.repositories == {}
