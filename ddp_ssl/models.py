"""Encoder and projection head."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ddp_ssl.config import Model
from ddp_ssl.utils.text import one_line, suggest

# Padding of the first convolution, by `model.stem`.
STEM_PADDING = {"small": 1, "small_pad2": 2}


def build_backbone(config: Model, sizes: Sequence[int]) -> tuple[nn.Module, int]:
    """The timm backbone without classifier, `[n, 3, S, S] -> [n, d_R]`, and d_R.

    `sizes`: the image sizes in pixels that it must take; each is tried.

    ResNets keep torchvision's initialisation (the last norm of a block is not zeroed), which the
    papers' code builds on. Raises `ValueError` for a name, arguments or sizes that timm refuses.
    """
    import timm  # here, so that `--help` does not wait for it
    from timm.models.resnet import ResNet

    name = config.backbone
    if not timm.is_model(name):
        hint = suggest(name, timm.list_models())
        raise ValueError(f"model.backbone: timm has no model {name!r}{hint}")
    arguments: dict[str, Any] = {"num_classes": 0, **config.backbone_args}
    try:
        try:
            model = timm.create_model(name, **{"zero_init_last": False, **arguments})
        except TypeError:  # not a ResNet
            model = timm.create_model(name, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = one_line(error)
        raise ValueError(
            f"model.backbone_args: {config.backbone_args} refused by {name}: {reason}"
        ) from None
    if config.stem != "standard":
        if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
            raise ValueError(
                f"model.stem: {config.stem} is for ResNets with one stem convolution, not {name}; "
                "standard would be accepted"
            )
        padding = STEM_PADDING[config.stem]
        stem = nn.Conv2d(3, model.conv1.out_channels, 3, stride=1, padding=padding, bias=False)
        if config.stem == "small":
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        setattr(model, "conv1", stem)  # noqa: B010 (timm's annotations are narrower)
        setattr(model, "maxpool", nn.Identity())  # noqa: B010
    return model, _width(model, config, sizes)


@torch.no_grad()
def _width(model: nn.Module, config: Model, sizes: Sequence[int]) -> int:
    """d_R, measured on the output (timm's `num_features` is another number for some models)."""
    model.eval()
    width = 0
    for size in sizes:
        try:
            width = model(torch.zeros(1, 3, size, size)).flatten(1).shape[1]
        except (AssertionError, RuntimeError, ValueError) as error:
            hint = "; model.backbone_args={dynamic_img_size: true} lets timm's ViTs take any size"
            raise ValueError(
                f"model.backbone: {config.backbone} cannot take images of {size} pixels: "
                f"{one_line(error)}{hint if 'vit' in config.backbone else ''}"
            ) from None
    model.train()
    return width


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


def architecture(config: Model) -> Model:
    """The same network without pretrained weights, which timm would fetch."""
    arguments = {k: v for k, v in config.backbone_args.items() if not k.startswith("pretrained")}
    return config.model_copy(update={"backbone_args": arguments})


def loading_snippet(
    config: Model,
    weights: str,
    form: Literal["timm", "torchvision", "safetensors", "onnx"] = "timm",
) -> str:
    """Python that loads an exported backbone without this package.

    `form`: see `ddp_ssl.export`; `timm` is also the `backbone.pt` of a run folder.
    """
    if form == "onnx":
        return (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({weights!r})\n"
            'features = lambda images: session.run(["features"], {"images": images})[0]'
        )
    if form == "torchvision":
        name = config.backbone.partition(".")[0]
        lines = [
            "import torch, torchvision",
            f"model = torchvision.models.{name}()",
            "model.fc = torch.nn.Identity()",
        ]
    else:
        config = architecture(config)
        arguments = "".join(f", {key}={value!r}" for key, value in config.backbone_args.items())
        lines = [
            "import timm, torch",
            f"model = timm.create_model({config.backbone!r}, num_classes=0{arguments})",
        ]
    if config.stem != "standard":
        lines += [
            "model.conv1 = torch.nn.Conv2d(3, model.conv1.out_channels, 3, "
            f"padding={STEM_PADDING[config.stem]}, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
    if form == "safetensors":
        lines.insert(1, "from safetensors.torch import load_file")
        lines.append(f"model.load_state_dict(load_file({weights!r}))")
    else:
        lines.append(f"model.load_state_dict(torch.load({weights!r}, weights_only=True))")
    return "\n".join([*lines, "model.eval()"])


def export(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The backbone's weights on the CPU, under timm's names."""
    return {name: value.detach().cpu().clone() for name, value in backbone.state_dict().items()}
