"""Backbones from runs, from torchvision, from timm and from other people's files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from ddp_ssl.config import Data, Model
from ddp_ssl.evals.pretrained import Pretrained, _normalisation_of, load_pretrained, normalised
from ddp_ssl.evals.settings import Backbone, EvaluateConfig, load_settings
from ddp_ssl.evals.weights import find_source
from ddp_ssl.methods.base import Progress
from ddp_ssl.models import build_backbone, loading_snippet
from tests.evals.runs import make_run
from tests.helpers import Operators

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
RESNET = Backbone(backbone="resnet18")


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """torchvision's ResNet-18 with running statistics that are not the initial ones."""
    torch.manual_seed(5)
    model = torchvision.models.resnet18()
    model.train()(torch.randn(4, 3, 48, 48))
    return model.eval()


def features(model: nn.Module, x: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return model(x).flatten(1)


def without_classifier(model: nn.Module, x: Tensor = IMAGES) -> Tensor:
    body = nn.Sequential(*list(model.children())[:-1])
    return features(body, x)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: s, "120 tensors; none missing; ignored: 2 others (fc.bias, fc.weight)"),
        (lambda s: {"state_dict": under("module.", s), "epoch": 3}, "'state_dict.module.'"),
        (
            lambda s: {
                "state_dict": {
                    **under("momentum_backbone.", {k: v + 1 for k, v in s.items()}),
                    **under("backbone.", s),
                    "projector.0.weight": torch.ones(3),
                }
            },
            "also complete: 'state_dict.momentum_backbone.' (model.prefix)",
        ),
        (lambda s: under("encoder._orig_mod.", s), "'encoder._orig_mod.'"),
        (
            lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
            "missing: 20 counters of batches",
        ),
    ],
    ids=["torchvision", "ddp", "momentum", "compiled", "no counters"],
)
def test_features_equal_torchvisions_whatever_stands_before_the_names(
    theirs: nn.Module,
    wrap: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    said: str,
    tmp_path: Path,
) -> None:
    torch.save(wrap(theirs.state_dict()), tmp_path / "weights.pth")
    loaded = load_pretrained(tmp_path / "weights.pth", RESNET, sizes=[48])
    assert torch.equal(features(loaded.backbone), without_classifier(theirs))
    assert loaded.width == 512
    assert not loaded.backbone.training
    assert said in loaded.description
    assert loaded.config is loaded.method is loaded.step is None


def test_a_given_prefix_is_taken(theirs: nn.Module, tmp_path: Path) -> None:
    state = theirs.state_dict()
    other = {k: v + 1 for k, v in state.items()}
    torch.save({**under("student.", state), **under("teacher.", other)}, tmp_path / "w.pt")
    model = Backbone(backbone="resnet18", prefix="teacher.")
    loaded = load_pretrained(tmp_path / "w.pt", model, sizes=[48])
    assert torch.equal(loaded.backbone.state_dict()["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_timms_weights_in_safetensors(name: str, tmp_path: Path) -> None:
    """The file has a classifier, the backbone has none."""
    model = timm.create_model(name, num_classes=7).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path / "model.safetensors", Backbone(backbone=name))
    model.reset_classifier(0)
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(features(loaded.backbone, x), features(model, x))


def test_timms_random_weights_are_those_of_the_seed() -> None:
    before = torch.get_rng_state()
    one, same, other = (
        load_pretrained("timm:resnet18", Backbone(), [48], seed=seed) for seed in (0, 0, 1)
    )
    assert one.digest == same.digest != other.digest
    assert torch.equal(before, torch.get_rng_state())
    assert "random weights of seed 0" in one.description


def test_the_average_of_a_runs_weights(photos: Path, tmp_path: Path) -> None:
    """Each step is that of numbers; the checkpoint's average is read as `RUN:ema`."""
    learner = make_run(tmp_path / "run", photos, "model.ema=0.3")
    assert learner.average is not None
    average, weight, x = learner.average, learner.method.backbone.conv1.weight, 1.0
    weight.data.fill_(x)
    average.conv1.weight.fill_(x)
    learner.method.backbone.bn1.running_mean.fill_(5)
    for step, keep in enumerate((0.1, 2 / 11, 0.25, 0.3, 0.3)):
        weight.data.add_(1)
        with Operators() as seen:
            learner.train().after_step(Progress(step, 5, 0, 1))
        assert "aten::copy_" not in seen.names
        assert seen.names["aten::_foreach_copy_"] <= 2  # of two types
        x = keep * x + (1 - keep) * (step + 2)
        assert average.conv1.weight.unique().tolist() == pytest.approx([x])
    assert average.bn1.running_mean.unique().tolist() == [5]
    assert not average.training
    saved = torch.load(tmp_path / "run/checkpoints/step_00000007.pt", weights_only=True)["model"]
    assert saved["average.bn1.bias"].eq(0).all()  # `make_run` changed the weights alone
    for text in ("", ":last", ":best", "/checkpoints/step_00000007.pt"):
        found = load_pretrained(f"{tmp_path}/run{text}:ema")
        assert torch.equal(found.backbone.bn1.bias, saved["average.bn1.bias"])
        assert found.digest != load_pretrained(f"{tmp_path}/run{text}").digest
    make_run(tmp_path / "plain", photos)
    with pytest.raises(
        ValueError, match=r"plain:ema: the run averaged no weights \(model.ema\); l"
    ):
        load_pretrained(f"{tmp_path}/plain:ema")
    with pytest.raises(ValueError, match="timm:resnet18:ema: belongs to no run"):
        load_pretrained("timm:resnet18:ema")


def test_features_of_a_vit_as_timm_pools_them() -> None:
    how = {"img_size": 16, "patch_size": 8, "depth": 2, "reg_tokens": 3}
    model = Backbone(backbone_args=how)
    name, x = "vit_tiny_patch16_224", torch.randn(3, 3, 24, 24)  # of another size than its own

    def features(choice: Any) -> tuple[Tensor, Any]:
        chosen = model.model_copy(update={"features": choice})
        found = load_pretrained(f"timm:{name}", chosen, [24])
        with torch.no_grad():
            y = found.backbone(x)
        assert y.shape == (3, found.width)
        return y, found

    theirs = {}
    for choice, pool in {"cls": "token", "mean": "avg"}.items():
        vit = timm.create_model(
            name, num_classes=0, dynamic_img_size=True, global_pool=pool, fc_norm=False, **how
        ).eval()
        vit.load_state_dict(features(None)[1].backbone.state_dict())
        with torch.no_grad():
            theirs[choice] = vit(x)
        assert torch.allclose(features(choice)[0], theirs[choice], atol=1e-6)
    assert torch.equal(features(None)[0], features("cls")[0])
    both, found = features("both")
    assert torch.allclose(both, torch.cat([*theirs.values()], 1), atol=1e-6)
    assert found.digest == features(None)[1].digest
    assert "both" in repr(found.backbone)
    with pytest.raises(ValueError, match="features: mean is for timm's ViTs, not ResNet; null is"):
        load_pretrained("timm:resnet18", Backbone(features="mean"), [32])
    bare = Backbone(features="cls", backbone_args={"class_token": False, "global_pool": "avg"})
    with pytest.raises(ValueError, match="cls needs a class token, and this network has none; mea"):
        load_pretrained(f"timm:{name}", bare, [224])


def test_a_run_and_its_files(photos: Path, tmp_path: Path) -> None:
    learner = make_run(tmp_path / "run", photos)
    newest = load_pretrained(tmp_path / "run")
    assert (newest.step, newest.epoch) == (7, 1)
    assert newest.path == tmp_path / "run/checkpoints/step_00000007.pt"
    assert newest.config is not None
    assert newest.config.method.name == "adadim"
    assert newest.method is not None
    x = torch.randn(3, 3, 16, 16)
    for ours, expected in zip(newest.method.embed(x), learner.method.embed(x), strict=True):
        assert torch.equal(ours, expected)
    assert newest.learner is not None
    assert newest.learner.probe.bias[0].item() == 7
    assert load_pretrained(f"{tmp_path}/run:last").digest == newest.digest
    assert load_pretrained(tmp_path / "run/backbone.pt", sizes=[16]).digest == newest.digest
    best = load_pretrained(f"{tmp_path}/run:best")
    assert best.step == 5
    assert best.digest != newest.digest
    assert load_pretrained(best.path).digest == best.digest


class Evil:
    def __reduce__(self) -> object:
        return (exec, ("raise SystemExit('executed')",))


def broken(kind: str, folder: Path, theirs: nn.Module) -> Path:
    path, state = folder / "weights.pt", theirs.state_dict()
    if kind == "evil":
        torch.save({"state_dict": state, "args": Evil()}, path)
    elif kind == "text":
        path.write_text("no weights at all")
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "empty":
        torch.save({"epoch": 3}, path)
    elif kind == "incomplete":
        torch.save({k: v for k, v in state.items() if not k.startswith("layer4")}, path)
    elif kind == "safetensors":
        path = folder / "weights.safetensors"
        path.write_text("no weights at all")
    else:
        torch.save(under("net.", state), path)
    return path


@pytest.mark.parametrize(
    ("kind", "model", "said"),
    [
        ("evil", RESNET, "could execute code"),
        ("text", RESNET, "is no file of weights"),
        ("cut", RESNET, "is no file of weights"),
        ("empty", RESNET, "holds no tensors"),
        ("safetensors", RESNET, "is no safetensors file"),
        ("incomplete", RESNET, "of 100 tensors 25 missing, the first layer4.0.conv1.weight"),
        ("whole", Backbone(backbone="resnet50"), "holds no complete resnet50 under 'net.'"),
        ("whole", Backbone(backbone="resnet18", stem="small"), "model.stem=standard"),
        ("whole", Backbone(backbone="vit_tiny_patch16_224"), "names are such as net.conv1.weight"),
        ("whole", Backbone(backbone="resnet18", prefix="nte."), "under 'nte.'"),
        ("whole", Backbone(backbone="resnt18"), "did you mean resnet18?"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    kind: str, model: Backbone, said: str, theirs: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_pretrained(broken(kind, tmp_path, theirs), model)
    assert said in str(error.value)


def test_a_damaged_checkpoint_is_passed_over_or_refused(photos: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", photos)
    newest = tmp_path / "run/checkpoints/step_00000007.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert load_pretrained(tmp_path / "run").step == 5
    with pytest.raises(ValueError, match="is damaged"):
        load_pretrained(newest)
    (tmp_path / "run/checkpoints/step_00000005.json").unlink()
    with pytest.raises(ValueError, match="no good checkpoint in"):
        load_pretrained(tmp_path / "run")


def test_timms_pretrained_weights_see_pixels_as_in_their_training() -> None:
    """A ViT's (0.5, 0.5, 0.5), unless the settings say otherwise."""
    network = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False)
    found = _normalisation_of(network)
    assert found == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    digits = EvaluateConfig.model_validate({"data": {"name": "digits"}})
    given = EvaluateConfig.model_validate({"data": {"name": "digits", "std": [1, 2, 3]}})
    weights = Pretrained(network, 192, None, None, None, None, None, "", normalisation=found)
    assert normalised(digits, weights).data.normalisation == found
    assert normalised(given, weights).data.normalisation == (found[0], (1, 2, 3))
    weights.normalisation = None
    assert normalised(digits, weights) is digits
    assert load_pretrained("timm:resnet18", Backbone(), [48]).normalisation is None  # random ones


@pytest.mark.parametrize("form", [(8, 9, 9, 3), (8, 9, 9, 4)])
def test_timms_weights_see_an_array_of_colours_as_they_see_files(
    tmp_path: Path, form: tuple[int, ...]
) -> None:
    """Other images than three channels of bytes have their own statistics."""
    x = np.random.default_rng(0).integers(0, 99, form).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    source = find_source("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    place = ["data.name=array", f"data.root={tmp_path / 'x.npy'}"]
    settings, _ = load_settings(source, place)
    half = (0.5, 0.5, 0.5)
    weights = Pretrained(
        nn.Identity(), 1, None, None, None, None, None, "", normalisation=(half, half)
    )
    mean, std = normalised(settings, weights).data.normalisation
    own = (x / 255).reshape(-1, form[3])
    np.testing.assert_allclose(mean, half if form[3] == 3 else own.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, half if form[3] == 3 else own.std(0), rtol=1e-5)


SMALL = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "own", "theirs", "first"),
    [
        ("resnet18", SMALL, {**SMALL, "layers": [2, 1, 1, 1]}, "layer1.1.conv1.weight"),
        ("resnet18", SMALL, {**SMALL, "layers": [1, 1, 1, 3]}, "layer4.1.conv1.weight"),
        ("vit_tiny_patch16_224", VIT, {**VIT, "depth": 3}, "blocks.2.norm1.weight"),
        ("vit_tiny_patch16_224", VIT, {**VIT, "init_values": 1e-5}, "blocks.0.ls1.gamma"),
    ],
)
def test_weights_of_a_larger_network_are_refused(
    name: str, own: dict[str, object], theirs: dict[str, object], first: str, tmp_path: Path
) -> None:
    larger = timm.create_model(name, num_classes=3, **theirs).state_dict()
    file = tmp_path / "w.pt"
    torch.save({"state_dict": under("module.", larger)}, file)
    with pytest.raises(ValueError, match=r"holds a larger network than .* the first " + first):
        load_pretrained(file, Backbone(backbone=name, backbone_args=own), [32])
    larger |= {"projector.0.weight": torch.ones(2), "queue": torch.ones(3, 4)}
    torch.save(larger, file)
    loaded = load_pretrained(file, Backbone(backbone=name, backbone_args=theirs), [32])
    assert "ignored: 4 others" in loaded.description  # the classifier and what is no backbone's


def test_a_classifier_inside_of_a_module_is_no_larger_network(tmp_path: Path) -> None:
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    model = timm.create_model("convnext_atto", num_classes=3, **arguments)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = load_pretrained(
        tmp_path / "w.pt", Backbone(backbone="convnext_atto", backbone_args=arguments), [64]
    )
    assert "ignored: 2 others (head.fc.bias, head.fc.weight)" in loaded.description


def test_a_bias_that_the_backbone_does_not_have_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", **SMALL).state_dict()
    torch.save({**state, "layer2.0.conv1.bias": torch.zeros(8)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"1 tensors inside of its modules .* layer2.0.conv1.bias"):
        load_pretrained(tmp_path / "w.pt", Backbone(backbone="resnet18", backbone_args=SMALL), [32])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features_only": True}, "features_only is not accepted: it gives several maps"),
        ({"out_indices": [1]}, "out_indices is not accepted"),
        ({"checkpoint_path": "/etc/passwd"}, "checkpoint_path is not accepted: it names weights"),
        ({"pretrained_cfg": {"file": "x"}}, "pretrained_cfg is not accepted"),
        ({"pretrained_cfg_overlay": {}}, "pretrained_cfg_overlay is not accepted"),
        ({"global_pool": ""}, r"give \[512, 2, 2\] for an image of 64 pixels; a vector is needed"),
        ({"layers": [1, 1]}, "cannot take images of 64 pixels"),
        ({"block": 3}, "refused by resnet18: AttributeError"),
        ({"act_layer": "nope"}, "refused by resnet18: KeyError"),
        ({"output_stride": 7}, "refused by resnet18: AssertionError"),
        ({"nonsense": 1}, "refused by resnet18: TypeError"),
    ],
)
def test_backbone_arguments_are_refused_in_one_line(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^model.backbone(_args)?: .*" + message) as caught:
        build_backbone(Model(backbone="resnet18", backbone_args=arguments), [64])
    assert "\n" not in str(caught.value)


def test_places_of_weights_are_no_models() -> None:
    for name in ("hf_hub:timm/resnet18.a1_in1k", "hf-hub:x/y", "local-dir:/tmp"):
        with pytest.raises(ValueError, match=r"^model.backbone: .* is a place of weights, not a"):
            build_backbone(Model(backbone=name), [64])


def test_weights_that_cannot_be_fetched_are_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^model.backbone_args: .* weights cannot be fetched: "):
        build_backbone(Model(backbone="resnet10t", backbone_args={"pretrained": True}), [64])
    assert time.monotonic() - start < 20


def test_num_classes_stands_once_in_the_snippet() -> None:
    model = Model(backbone_args={"num_classes": 0, **SMALL})
    text = loading_snippet(model, Data(), Path("w.pt"))
    assert text.count("num_classes") == 1
