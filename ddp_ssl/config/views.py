"""The views of an image: augmentations of one crop, named recipes, and the groups of a config.

Jitter strengths are those of torchvision's `ColorJitter` (hue as a fraction of a turn);
probabilities are per image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from ddp_ssl.config.section import Probability, Section, Side, Strength
from ddp_ssl.utils.text import suggest

# Fields that older checkpoints do not know; they are written down only where they are set.
LATER = ("vertical_flip_p", "rotate", "function")
QUARTERS = 90
"""The `rotate` that means quarter turns."""


@dataclass(frozen=True, repr=False)
class View:
    """One random view, in this order: crop, turn, jitter, grayscale, blur, solarize, flip."""

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
    vertical_flip_p: float = 0.0
    rotate: float = 0.0
    """0: no turn; 90: 0 to 3 quarter turns; otherwise an angle within +- so many degrees."""
    function: str = ""
    """`module:function` that makes the view in place of all augmentations; empty: none."""

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        shown = (f"{name}={value!r}" for name, value in values if value or name not in LATER)
        return f"View({', '.join(shown)})"


class CentralCrop(NamedTuple):
    """Evaluation of an image: resize its shorter side, then crop the central `size` x `size`."""

    resize: int
    size: int
    interpolation: str = "bicubic"
    """Or `bilinear`; both antialiased."""


AUGMENTATION_FIELDS = tuple(f.name for f in fields(View) if f.name not in ("size", "function"))

# Probabilities of what changes colours.
COLOURS = ("jitter_p", "gray_p", "solarize_p")

# The recipes of solo-learn, ReSSL and SwAV. A recipe lists one view or more, and a group takes them
# in turn: four views of `asym` are first, second, first, second.
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

# Changes to a recipe for views smaller than the run's largest: SwAV's multi-crop.
SMALL: dict[str, dict[str, Any]] = {"multiview": {"scale": (0.05, 0.14)}}


class ViewGroup(Section):
    """`count` views of one size from a recipe. Unset augmentations are the recipe's."""

    count: int = Field(2, ge=1, le=1000)
    """Number of views."""
    size: Side = 224
    """Side of the crops, in pixels."""
    recipe: str = "asym"
    """Named augmentations: asym, sym, weak, vic, ressl, multiview, crop; or `module:function`, a
    function of one's own on DALI's graph, docs/data.md."""
    scale: tuple[Probability, Probability] | None = None
    """Range of the crop's area, as a fraction of the image's."""
    ratio: tuple[Strength, Strength] | None = None
    """Range of the crop's aspect ratio."""
    jitter_p: Probability | None = None
    """Probability of colour jitter."""
    brightness: Strength | None = None
    """Brightness jitter, as torchvision's."""
    contrast: Strength | None = None
    """Contrast jitter, as torchvision's."""
    saturation: Strength | None = None
    """Saturation jitter, as torchvision's."""
    hue: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """Hue jitter, as a fraction of a turn."""
    gray_p: Probability | None = None
    """Probability of grayscale."""
    blur_p: Probability | None = None
    """Probability of Gaussian blur."""
    blur_sigma: tuple[Strength, Strength] | None = None
    """Range of the blur's standard deviation, in pixels."""
    solarize_p: Probability | None = None
    """Probability of solarisation at 128."""
    flip_p: Probability | None = None
    """Probability of a horizontal flip."""
    vertical_flip_p: Probability | None = None
    """Probability of a vertical flip. Unset: 0."""
    rotate: Annotated[float, Field(ge=0, le=180)] | None = None
    """90: no turn or one, two or three quarter turns, equally often, without interpolation.
    Another number: an angle drawn from plus or minus so many degrees, bilinear; the pixels at the
    border of the crop are repeated into the corners. Unset: 0, no turn."""

    @field_validator("recipe")
    @classmethod
    def _known_recipe(cls, value: str) -> str:
        if value not in RECIPES and not re.fullmatch(r"[\w.]+:\w+", value):
            raise ValueError(
                f"unknown recipe {value!r}{suggest(value, RECIPES)}; accepted: "
                f"{', '.join(RECIPES)}, or module:function"
            )
        return value

    @field_validator("scale", "ratio", "blur_sigma")
    @classmethod
    def _is_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError(f"expected [low, high] with 0 < low <= high, got {list(value)}")
        return value

    @model_serializer(mode="wrap")
    def _as_older_checkpoints(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        return {k: v for k, v in values.items() if v is not None or k not in LATER}

    @property
    def overrides(self) -> dict[str, Any]:
        """The augmentation fields that are set here."""
        values = {name: getattr(self, name) for name in AUGMENTATION_FIELDS}
        return {name: value for name, value in values.items() if value is not None}


def views_of(groups: Sequence[ViewGroup]) -> list[View]:
    """The views of all groups, the largest crops first.

    Groups of one size keep their order, so view 0 is the first one listed of the largest size.
    A group takes its recipe's views in turn and applies its overrides to each.
    """
    views, largest = [], max((group.size for group in groups), default=0)
    for group in groups:
        recipe = RECIPES.get(group.recipe) or (View(function=group.recipe),)
        small = SMALL.get(group.recipe, {}) if group.size < largest else {}
        for index in range(group.count):
            base = recipe[index % len(recipe)]
            views.append(replace(base, size=group.size, **{**small, **group.overrides}))
    return sorted(views, key=lambda view: -view.size)
