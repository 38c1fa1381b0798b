"""Encoder and projection head."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ddp_ssl.config import Config, Data, Model
from ddp_ssl.config.backbones import check_backbone
from ddp_ssl.errors import refused
from ddp_ssl.utils import hub
from ddp_ssl.utils.text import one_line

# Padding of the first convolution, by `model.stem`.
STEM_PADDING = {"small": 1, "small_pad2": 2}

# Arguments of `timm.create_model` that are no part of an architecture.
_FILE = "it names weights; run.init_from takes those of a run, `pretrained: true` those of timm"
_MAPS = "it gives several maps of features; one vector for an image is needed"
REFUSED = {
    "checkpoint_path": _FILE,
    "pretrained_cfg": _FILE,
    "pretrained_cfg_overlay": _FILE,
    "cache_dir": _FILE,
    "features_only": _MAPS,
    "out_indices": _MAPS,
    "model_name": "model.backbone is the name",
}


# timm's modules of ViTs that take images of any size that their patches divide.
VITS = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")


def build_backbone(config: Model, sizes: Sequence[int]) -> tuple[nn.Module, int]:
    """The timm backbone without classifier, `[n, C, S, S] -> [n, d_R]`, and d_R.

    `sizes`: the image sizes in pixels that it must take; each is tried.

    ResNets keep torchvision's initialisation (the last norm of a block is not zeroed), which the
    papers' code builds on. ViTs interpolate their position embeddings to each size. Raises
    `ValueError` for a name, arguments or sizes that timm refuses.
    """
    import timm  # here, so that `--help` does not wait for it
    from timm.models.resnet import ResNet

    name = config.backbone
    check_backbone(name)
    for key in sorted(REFUSED.keys() & config.backbone_args.keys()):
        raise ValueError(f"model.backbone_args: {key} is not accepted: {REFUSED[key]}")
    arguments: dict[str, Any] = {"num_classes": 0, **any_size(config).backbone_args}
    place = arguments.get("pretrained")
    if isinstance(place, str):
        arguments |= hub.weights_of(place, name)
    try:
        with hub.no_waiting() if arguments.get("pretrained") else contextlib.nullcontext():
            try:
                model = timm.create_model(name, **{"zero_init_last": False, **arguments})
            except TypeError:  # not a ResNet
                model = timm.create_model(name, **arguments)
    except Exception as error:  # any argument reaches any of timm's code, and its downloads
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        fetched = arguments.get("pretrained") and not isinstance(error, TypeError | AssertionError)
        what = "weights cannot be fetched" if fetched else f"refused by {name}"
        if isinstance(place, str):
            what = f"not what {place} was made with, {hub.described(place)[1]}"
        raise ValueError(f"model.backbone_args: {config.backbone_args} {what}: {reason}") from None
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)  # the hub's, once more
    if config.stem != "standard":
        if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
            raise ValueError(
                f"model.stem: {config.stem} is for ResNets with one stem convolution, not {name}; "
                "standard would be accepted"
            )
        padding = STEM_PADDING[config.stem]
        planes = channels(config), model.conv1.out_channels
        stem = nn.Conv2d(*planes, 3, stride=1, padding=padding, bias=False)
        if config.stem == "small":
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        setattr(model, "conv1", stem)  # noqa: B010 (timm's annotations are narrower)
        setattr(model, "maxpool", nn.Identity())  # noqa: B010
    return model, _width(model, config, sizes)


def channels(config: Model) -> int:
    """C, the channels of an image: timm's `in_chans`, or 3."""
    given = config.backbone_args.get("in_chans", 3)
    return given if isinstance(given, int) else 3


def recompute(backbone: nn.Module, config: Config) -> None:
    """Make the backbone's blocks compute their activations again, if `model.checkpointing` is set.

    Raises `ValueError` if activations are to be computed again and the backbone has batch norms,
    which would move their running averages twice and see a part of the batch alone.
    """
    key = "optim.accumulate" if config.optim.accumulate > 1 else "model.checkpointing"
    if config.optim.accumulate == 1 and not config.model.checkpointing:
        return
    norms = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
    if any(isinstance(module, norms) for module in backbone.modules()):
        raise ValueError(
            f"{key}: {config.model.backbone} has batch norms, whose statistics are those of all "
            "images at once; a backbone that normalises each image by itself (layer or group norm, "
            "such as vit_small_patch16_224) is accepted"
        )
    if config.model.checkpointing:
        with refused(
            f"model.checkpointing: timm's {config.model.backbone} cannot",
            "false is accepted, or optim.accumulate",
        ):
            backbone.set_grad_checkpointing(True)  # type: ignore[operator]


@torch.no_grad()
def _width(model: nn.Module, config: Model, sizes: Sequence[int]) -> int:
    """d_R, measured on the output (timm's `num_features` is another number for some models)."""
    model.eval()
    widths: dict[int, int] = {}
    for size in sizes:
        try:
            made = model(torch.zeros(1, channels(config), size, size))
        except Exception as error:  # whatever arguments make of timm's code
            hint = ""
            if isinstance(error, AssertionError) and any_size(config) is config:
                hint = (
                    f"; model.backbone_args={{img_size: {size}}} makes it for this size alone; "
                    "timm's ViT, DeiT and EVA take all that their patches divide"
                )
            raise ValueError(
                f"model.backbone: {config.backbone} cannot take images of {size} pixels: "
                f"{one_line(error, 300)}{hint}"
            ) from None
        shape = list(made.shape[1:]) if isinstance(made, torch.Tensor) else [type(made).__name__]
        if len([n for n in shape if n != 1]) > 1 or not isinstance(made, torch.Tensor):
            raise ValueError(
                f"model.backbone_args: {config.backbone_args} makes {config.backbone} give "
                f"{shape} for an image of {size} pixels; a vector is needed, as with "
                "`global_pool: avg`"
            )
        widths[size] = made.flatten(1).shape[1]
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"model.backbone: {config.backbone} gives vectors of different lengths for images of "
            f"different sizes: {widths}; a model that pools is accepted"
        )
    model.train()
    return next(iter(widths.values()), 0)


def projection_head(
    width: int,
    widths: Sequence[int],
    norm: str,
    bias: bool,
    last_norm: Literal["none", "batch", "plain"] = "none",
) -> nn.Sequential:
    """Linear layers of the given widths with norm and ReLU between them: `[n, width] -> [n, d]`.

    `last_norm`: after the last layer nothing, a batch norm, or one without weight and bias.
    """
    layers: list[nn.Module] = []
    for index, out in enumerate(widths):
        layers.append(nn.Linear(width, out, bias=bias))
        if index < len(widths) - 1:
            if norm == "batch":
                layers.append(nn.BatchNorm1d(out))
            layers.append(nn.ReLU(inplace=True))
        width = out
    if last_norm != "none":
        layers.append(nn.BatchNorm1d(width, affine=last_norm == "batch"))
    return nn.Sequential(*layers)


def any_size(config: Model) -> Model:
    """The same network; a ViT of timm's takes images of any size that its patches divide."""
    from timm.models import is_model, model_entrypoint

    name = config.backbone.partition(".")[0]
    vits = {f"timm.models.{module}" for module in VITS}
    if not is_model(name) or model_entrypoint(name).__module__ not in vits:
        return config
    arguments = {"dynamic_img_size": True, **config.backbone_args}
    return config.model_copy(update={"backbone_args": arguments})


def architecture(config: Model) -> Model:
    """The same network for any size of image and without pretrained weights, which timm fetches."""
    every = any_size(config).backbone_args
    arguments = {k: v for k, v in every.items() if not k.startswith("pretrained")}
    return config.model_copy(update={"backbone_args": arguments})


def own_weights(config: Config) -> Config:
    """The config of a network that will get a checkpoint's weights: none are fetched for it."""
    return config.model_copy(update={"model": architecture(config.model)})


def loading_snippet(
    config: Model,
    data: Data,
    weights: Path | str,
    form: Literal["timm", "torchvision", "safetensors", "onnx", "hub"] = "timm",
) -> str:
    """Python that loads an exported backbone without this package, from any folder.

    It defines `model` and `transform`, from a PIL image to the model's input, as the run evaluates.
    `form`: see `ddp_ssl.export`; `timm` is also the `backbone.pt` of a run folder. `weights`: their
    file, or `hf-hub:USER/NAME`.
    """
    path = str(Path(weights).absolute())
    imports = ["import torch", "from PIL import Image", "from torchvision import transforms"]
    load = f"model.load_state_dict(torch.load({path!r}, weights_only=True, map_location='cpu'))"
    if form == "onnx":
        imports[0] = "import onnxruntime"
        lines = [
            f"session = onnxruntime.InferenceSession({path!r})",
            'model = lambda images: session.run(["features"], {"images": images.numpy()})[0]',
        ]
    elif form == "hub":
        imports[0] = "import timm, torch"
        name = str(weights)
        name = name if name.startswith(hub.PREFIX) else f"local-dir:{Path(path).parent}"
        lines = [f"model = timm.create_model({name!r}, pretrained=True)"]
    elif form == "torchvision":
        imports[0] = "import torch, torchvision"
        name = config.backbone.partition(".")[0]
        lines = [f"model = torchvision.models.{name}()", "model.fc = torch.nn.Identity()"]
    else:
        imports[0] = "import timm, torch"
        every = {"num_classes": 0, **architecture(config).backbone_args}
        arguments = "".join(f", {key}={value!r}" for key, value in every.items())
        lines = [f"model = timm.create_model({config.backbone!r}{arguments})"]
    if config.stem != "standard" and form not in ("onnx", "hub"):
        lines += [
            f"model.conv1 = torch.nn.Conv2d({channels(config)}, model.conv1.out_channels, 3, "
            f"padding={STEM_PADDING[config.stem]}, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
    if form == "safetensors":
        imports.insert(1, "from safetensors.torch import load_file")
        load = f"model.load_state_dict(load_file({path!r}))"
    if form != "onnx":
        lines += [*([load] if form != "hub" else []), "model.eval()"]
    crop, (mean, std) = data.central_crop, data.normalisation
    kernel = f"transforms.InterpolationMode.{crop.interpolation.upper()}"
    opened = "Image.open('image.jpg').convert('RGB')"
    to_tensor = ["    transforms.ToTensor(),"]
    if data.name == "array":
        imports.remove("from PIL import Image")
        opened = "x"
        to_tensor = ["    # x: float32 [C, H, W]; bytes are divided by 255, other numbers are not."]
    return "\n".join([
        *imports, "", *lines,
        "transform = transforms.Compose([",
        f"    transforms.Resize({crop.resize}, {kernel}),",
        f"    transforms.CenterCrop({crop.size}),",
        *to_tensor,
        f"    transforms.Normalize({mean}, {std}),",
        "])",
        f"# features = model(transform({opened})[None])",
    ])  # fmt: skip


def export(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The backbone's weights on the CPU, under timm's names."""
    return {name: value.detach().cpu().clone() for name, value in backbone.state_dict().items()}
