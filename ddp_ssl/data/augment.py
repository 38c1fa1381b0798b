"""What a view is: the augmentations of one crop of an image, and the named recipes.

Torch-free and DALI-free; `pipeline.py` turns a `View` into a graph. Jitter strengths are those of
torchvision's `ColorJitter` (hue as a fraction of a turn); probabilities are per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class View:
    """One random view: crop; jitter, gray, blur, solarize, each with its probability; flip."""

    size: int = 224
    """Side of the square output, in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio (width / height)."""
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation, in pixels of the output."""
    solarize_p: float = 0.0
    flip_p: float = 0.5


class PixelFormat(NamedTuple):
    """What the views are: mean and standard deviation for pixels in [0, 1]; float16 or float32."""

    mean: Sequence[float]
    std: Sequence[float]
    half: bool = False


class CentralCrop(NamedTuple):
    """How an image is evaluated: the shorter side to `resize`, then the central `size` x `size`."""

    resize: int
    size: int
    interpolation: str = "bicubic"
    """Or `bilinear`; both antialiased."""


class Decoding(NamedTuple):
    """How a GPU decodes: the hardware's share of the JPEGs, and the width and height to expect."""

    hw_load: float = 0.65
    preallocate: tuple[int, int] | None = None


# The recipes of solo-learn, of ReSSL and of SwAV. A recipe lists one view or more; a group of views
# takes them in turn, so `asym` with four views is first, second, first, second.
RECIPES: dict[str, tuple[View, ...]] = {
    "asym": (
        View(blur_p=1.0, solarize_p=0.0),
        View(blur_p=0.1, solarize_p=0.2),
    ),
    "sym": (View(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),),
    "weak": (View(saturation=0.4),),
    "vic": (View(scale=(0.2, 1.0), solarize_p=0.1),),
    "ressl": (
        View(),
        View(jitter_p=0.0, gray_p=0.0, blur_p=0.0),
    ),
    "multiview": (View(scale=(0.14, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),),
    "crop": (View(jitter_p=0.0, gray_p=0.0, blur_p=0.0, flip_p=0.0),),
}

# What a recipe changes for views smaller than the run's largest: SwAV's multi-crop.
SMALL: dict[str, dict[str, Any]] = {"multiview": {"scale": (0.05, 0.14)}}


class Group(Protocol):
    """A view group of the config: `count` views of one size, from a recipe, with overrides."""

    @property
    def count(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def recipe(self) -> str: ...
    @property
    def overrides(self) -> dict[str, Any]: ...


def views_of(groups: Sequence[Group]) -> list[View]:
    """The views of all groups, large crops first (a stable order, so view 0 is the first listed).

    A recipe's views are taken in turn; a group's overrides apply to each of them.
    """
    views, largest = [], max((group.size for group in groups), default=0)
    for group in groups:
        recipe = RECIPES[group.recipe]
        small = SMALL.get(group.recipe, {}) if group.size < largest else {}
        for index in range(group.count):
            base = recipe[index % len(recipe)]
            views.append(replace(base, size=group.size, **{**small, **group.overrides}))
    return sorted(views, key=lambda view: -view.size)


AUGMENTATION_FIELDS = tuple(f.name for f in fields(View) if f.name != "size")
