"""Backbones from runs, from torchvision, from timm and from other people's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from ddp_ssl.evals.pretrained import Pretrained, _normalisation_of, load_pretrained, normalised
from ddp_ssl.evals.settings import Backbone, EvaluateConfig
from tests.evals.runs import make_run

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
