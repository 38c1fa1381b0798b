"""The cost of a run, from stated constants."""

from copy import deepcopy
from functools import cache
from typing import Any

import yaml

from ddp_ssl.config import read_yaml
from ddp_ssl.config.files import FOLDER
from ddp_ssl.reproduction.cells import Cell

# ResNet-50, 224 px, mixed precision, DALI, one A100: 2,470 images/s of training (NVIDIA
# DeepLearningExamples). At 4.09 G multiplications and additions an image that is 10.1 T a second.
ANCHOR_IMAGES_PER_S, ANCHOR_MACS = 2470.0, 4.09e9
MACS_224 = {"resnet18": 1.81e9, "resnet50": 4.09e9}  # of one forward pass, standard stem
SMALL_STEM = 4  # s px without stride and max-pool cost as much as 4 s px with both
# A momentum network adds a forward pass to a forward and a backward one of twice its cost.
MOMENTUM = dict.fromkeys(("byol", "mocov2plus", "mocov3", "ressl", "dino"), 4 / 3)
IMAGES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "tiny_imagenet": 100_000,
    "cinic10": 90_000,
    "stl10": 105_000,
    "blood": 11_959,
    "organa": 34_561,
    "organs": 13_932,
    "organc": 12_975,
    "inat21": 2_686_843,
    "imagenet100": 126_689,
    "digits": 1_438,
}
DIGITS_IMAGES_PER_S = 400  # two views, one process on one of two cores, both busy

CONSTANTS = (
    "h: GPU-hours of one seed on one A100 that trains a ResNet-50 on 2,470 images/s at 224 px "
    "(NVIDIA DeepLearningExamples), scaled by multiplications, views, images and epochs; a "
    "momentum network adds a third. Small images use a GPU less well: lower bounds there. "
    "Evaluation is not counted."
)


def gpu_hours(tree: dict[str, Any]) -> float:
    """GPU-hours of one run on one A100; `tree` is its config as nested dictionaries."""
    model, data = tree["model"], tree["data"]
    stem = SMALL_STEM if model.get("stem") == "small" else 1
    per_image = sum(
        group["count"] * MACS_224[model["backbone"]] * (stem * group["size"] / 224) ** 2
        for group in data["views"]
    )
    images = IMAGES[data["name"]] * data.get("fraction", 1) * tree["optim"]["epochs"]
    factor = MOMENTUM.get(tree["method"]["name"], 1.0)
    return float(images * per_image * factor / (ANCHOR_IMAGES_PER_S * ANCHOR_MACS) / 3600)


def show(hours: float) -> str:
    """`0.4`, `1,234`."""
    return f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}"


def cpu_minutes(tree: dict[str, Any]) -> float:
    """Minutes of one run on the embedded digits, on one of two cores."""
    data = tree["data"]
    images = IMAGES["digits"] * data.get("fraction", 1) * tree["optim"]["epochs"]
    views = sum(group["count"] for group in data["views"])
    return float((images * views / 2 / DIGITS_IMAGES_PER_S + 25) / 60)


@cache
def _base(name: str) -> dict[str, Any]:
    return read_yaml(FOLDER / name)


def outline(cell: Cell) -> dict[str, Any]:
    """The config that the cost needs, without validation, which takes 30 ms."""
    tree = deepcopy(_base(cell.base))
    for override in cell.overrides:
        key, _, text = override.partition("=")
        *parts, last = key.split(".")
        node: Any = tree
        for part in parts:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = yaml.safe_load(text)
    return tree
