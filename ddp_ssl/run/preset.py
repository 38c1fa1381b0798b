"""A config for images that no config was given for: a preset, and the choices on top of it.

`configs/preset/SIDE.yaml` is chosen by the size and the number of the images. Each key that their
number or the machine asks to change is a choice, with its reason as the origin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ddp_ssl.config.files import PRESETS
from ddp_ssl.config.reader import Layer
from ddp_ssl.config.schema import Data, MethodConfig, Optim
from ddp_ssl.config.text import flow
from ddp_ssl.config.views import COLOURS
from ddp_ssl.data.recognise import Look, look_at
from ddp_ssl.driver import gpu_is_meant
from ddp_ssl.errors import ConfigError
from ddp_ssl.utils.launcher import has_bf16, rank_and_size
from ddp_ssl.utils.text import counted

# The largest side in pixels of images for which a preset is.
SIDES = {32: 40, 64: 80, 128: 176, 224: math.inf}
FEW = 5_000  # training images below which 128 pixels are enough
SMALL = 20_000  # training images below which a ResNet-18 is enough
CPU_SIDE, CPU_BATCH, CPU_STEPS = 64, 64, 1_000
STEPS_PER_EPOCH = 8  # at least, so that the batch is not most of the images
STEPS, LEAST_EPOCHS, MOST_EPOCHS = 20_000, 100, 1_000  # on a GPU
MEASUREMENTS = 20  # of alpha, in a run
# DINO's prototypes, momentum and temperatures are for a million images. On few the teacher's
# distribution stays uniform, and nothing is learned: docs/benchmarks.md#presets. These are the
# values of lightly-train 0.18 for fewer than 20,000 images.
DINO = {
    "prototypes": 1024,
    "momentum": 0.99,
    "teacher_temperature": 0.02,
    "warmup_teacher_temperature": 0.02,
    "warmup_teacher_epochs": 0,
}


class Choice(NamedTuple):
    """A value that replaces a preset's, and why."""

    key: str
    value: Any
    reason: str


class Preset:
    """The preset for the images that the command line names, and the choices on top of it."""

    def __init__(self, typed: Mapping[str, Any], data: Data, device: str) -> None:
        """`typed`: the tree of the command line. Raises `ConfigError` where there are no images."""
        self._typed = typed
        given = typed.get("data", {}).get("name")
        self.look: Look = look_at(data, given)
        self._gpu = device != "cpu" and (device == "cuda" or gpu_is_meant() is not None)
        side, bound = self._side()
        self.path = PRESETS / f"{side}.yaml"
        place = ", ".join(data.roots) or data.files
        self.headline = (
            f"{place or self.look.name}: {self.look.number} {self.look.what} to train on, about "
            f"{self.look.side} pixels a side: preset/{side}{bound}"
        )
        self.name: list[Layer] = []
        if given is None:
            self.name = [("by the files that are there", {"data": {"name": self.look.name}})]

    def _side(self) -> tuple[int, str]:
        """The preset's side, and why it is smaller than the images'."""
        side = next(s for s, largest in SIDES.items() if self.look.side <= largest)
        if not self._gpu and side > CPU_SIDE:
            return CPU_SIDE, f" (no GPU, {CPU_SIDE} pixels at most)"
        if side > 128 and 0 < self.look.images < FEW:
            return 128, f" (fewer than {FEW} images)"
        return side, ""

    def layers(
        self, tree: Mapping[str, Any], method: type[MethodConfig]
    ) -> tuple[list[Layer], list[str]]:
        """The layers on top of the preset's `tree`, and a line for each choice in them.

        The origin of a choice is its reason.
        """
        made = list(self.name)
        choices = self.choices(tree, method)
        for key, value, reason in choices:
            section, _, name = key.partition(".")
            made.append((reason, {section: {name: value}}))
        return made, [f"{key}={flow(value)}: {reason}" for key, value, reason in choices]

    def choices(self, preset: Mapping[str, Any], method: type[MethodConfig]) -> list[Choice]:
        """What replaces the preset's values; keys that the user typed are left alone.

        `preset`: the tree of its YAML. Raises `ConfigError` if the images are too few for the
        processes.
        """
        values = {
            f"{section}.{key}": value
            for tree in (preset, self._typed)
            for section, part in tree.items()
            for key, value in part.items()
        }
        made: list[Choice] = []

        def choose(key: str, value: Any, reason: str) -> None:
            section, _, name = key.partition(".")
            if name not in self._typed.get(section, {}) and values.get(key) != value:
                values[key] = value
                made.append(Choice(key, value, reason))

        if not self.look.colours:
            off = dict.fromkeys(COLOURS, 0)
            views = [{**group, **off} for group in preset["data"]["views"]]
            choose("data.views", views, "these images have no colours to change")
        count = self.look.images
        if not self._gpu and not has_bf16():
            choose("optim.precision", "fp32", "this CPU has no instructions for bf16")
        if count < SMALL and values["model.backbone"] == "resnet50" and count:
            choose("model.backbone", "resnet18", f"fewer than {SMALL} images")
        own = method.model_fields["name"].default
        if own == "simsiam":
            choose("optim.name", "sgd", "with AdamW simsiam's embeddings collapse")
        if own == "dino" and 0 < count < SMALL:
            for key, value in DINO.items():
                choose(f"method.{key}", value, f"fewer than {SMALL} images")
        before, name = preset["data"]["batch_size"], preset["optim"]["name"]
        if count and "batch_size" not in self._typed.get("data", {}):
            choose("data.batch_size", *self._batch(before))
        elif not count and not self._gpu:
            choose("data.batch_size", CPU_BATCH, "a CPU")
        batch = values["data.batch_size"]
        if values["optim.name"] != name:
            recipe = {**Optim().model_dump(), **method.recipe.get("optim", {})}
            for key, what in (("lr", "rate"), ("weight_decay", "decay")):
                reason = f"the recipe's {what}; the preset's is for {name}"
                choose(f"optim.{key}", recipe[key], reason)
        elif name == "adamw":
            peak = preset["optim"]["lr"] * before / 256
            rate = float(f"{peak * 256 / batch:.3g}")
            choose("optim.lr", rate, f"AdamW's peak stays {peak:g} with {batch} images a step")
        if count:
            steps = max(1, count // batch)
            choose("optim.epochs", *self._epochs(steps))
        epochs = values["optim.epochs"]
        warmup = min(preset["optim"]["warmup_epochs"], epochs / 10)
        choose("optim.warmup_epochs", warmup, f"a tenth of {counted(epochs, 'epoch')}")
        if "alpha_every" in method.model_fields:
            every = max(1, epochs // MEASUREMENTS)
            often = counted(epochs // every, "measurement")
            choose("method.alpha_every", every, f"about {often} of alpha")
        return made

    def _batch(self, largest: int) -> tuple[int, str]:
        """The images of a step: a power of two, or a multiple of the processes."""
        count, size = self.look.images, rank_and_size()[1]
        if 1 < count < 2 * size:  # one image is refused with the reason when the data are there
            raise ConfigError(
                f"data.batch_size: {count} images to train on, and a step takes at least 2 for "
                f"each of {size} processes; accepted: at most "
                f"{counted(count // 2, 'process', 'processes')}, or more images"
            )
        bound = largest if self._gpu else min(largest, CPU_BATCH)
        fits = max(2, count // STEPS_PER_EPOCH)
        wanted = min(bound, 2 ** int(math.log2(fits)))
        batch = max(2 * size, -(-wanted // size) * size)
        if batch > wanted:
            return batch, f"{size} processes"
        if fits >= bound:
            return batch, "a CPU"
        if count // batch < STEPS_PER_EPOCH:
            return batch, "few images"
        return batch, f"{self.look.number} images: at least {STEPS_PER_EPOCH} steps an epoch"

    def _epochs(self, steps: int) -> tuple[int, str]:
        if self._gpu:
            epochs = min(max(LEAST_EPOCHS, -(-STEPS // steps)), MOST_EPOCHS)
        else:
            epochs = min(-(-CPU_STEPS // steps), MOST_EPOCHS)
        an_epoch, total = f"{counted(steps, 'step')} an epoch", f": {epochs * steps} steps"
        if self.look.capped:  # the steps are not known
            an_epoch, total = f"{self.look.number} images", ""
        if self._gpu:
            return epochs, an_epoch + total
        return epochs, f"{an_epoch}, on a CPU{total}; more learn more"
