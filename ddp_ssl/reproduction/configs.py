"""From a cell to a whole, valid config: the paper's, or the small one on the embedded digits."""

from collections.abc import Sequence
from pathlib import Path

from ddp_ssl.config import Config, ConfigError, Resolved
from ddp_ssl.data.datasets import digits
from ddp_ssl.data.datasets.cache import write_atomically
from ddp_ssl.reproduction.cells import Cell
from ddp_ssl.run.configure import load
from ddp_ssl.run.identity import identity

# A tenth of the epochs, but not fewer than 40 (440 steps of 128 images).
SHARE, LEAST = 10, 40
WIDTHS_BY = 4  # projectors of 2048 become 512, the embedded default's
SMALL_RULE = (
    "Small scale: the 1,797 embedded digits, a ResNet-18 of 16 to 128 channels, 128 images a step; "
    "a tenth of the epochs, but at least 40, with AdaDim's nu and the warm-up in proportion. The "
    "method's keys are the paper's. AdaDim's tables: projectors a quarter as wide, LARS at the "
    "embedded default's rate of 0.1. Multi-view tables: Adam at the paper's 1e-3, constant, and "
    "the projector's true width."
)


def resolve(cell: Cell, scale: str, seed: int, overrides: Sequence[str] = ()) -> Resolved:
    """The config of one run; `overrides` of the command line come last."""
    keys = (f"run.seed={seed}", *overrides)
    if scale == "full":
        return load([*cell.arguments, *keys])
    return load([*_small(cell), *keys])


def _small(cell: Cell) -> list[str]:
    full = load(cell.arguments).config
    epochs = max(full.optim.epochs // SHARE, LEAST)
    ratio = epochs / full.optim.epochs
    keys = [f"optim.epochs={epochs}", f"data.views.0.count={full.num_views}"]
    for key, value in full.method.model_dump(mode="json").items():
        if key == "alpha_every":
            value = max(1, round(value * ratio))
        if value is not None:
            keys.append(f"method.{key}={value}")
    if full.optim.name == "adam":
        keys += [
            f"model.projector={full.model.projector}",
            f"model.projector_bias={str(full.model.projector_bias).lower()}",
            f"model.views_forward={full.model.views_forward}",
            f"data.fraction={full.data.fraction:g}",
            "data.batch_size=128",
            # The schema's rate is per 256 images.
            "optim.name=adam", f"optim.lr={2 * full.optim.lr:g}",
            f"optim.weight_decay={full.optim.weight_decay:g}",
            f"optim.warmup_epochs={full.optim.warmup_epochs * ratio:g}",
            f"optim.final_lr_fraction={full.optim.final_lr_fraction:g}",
        ]  # fmt: skip
    else:
        widths = [width // WIDTHS_BY for width in full.model.projector]
        keys += [
            f"model.projector={widths}",
            f"optim.warmup_epochs={full.optim.warmup_epochs * ratio:g}",
        ]
    return [*keys, "eval.every=5", "measure.every=5", "eval.raw_pixels=false"]


def negative_digits(folder: Path) -> None:
    """The embedded digits with black and white exchanged, as class folders, if not there yet.

    The other data set of a transfer at small scale.
    """
    from PIL import Image, ImageOps

    def make(place: Path) -> None:
        digits.write(place)
        for path in place.rglob("*.jpg"):
            with Image.open(path) as image:
                negative = ImageOps.invert(image)
            negative.save(path, "JPEG", quality=95)

    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder, make)


def write(path: Path, resolved: Resolved, heading: str, keep: bool = False) -> None:
    """Write the whole config, or raise `ConfigError` if the file there is of another run.

    Keys that may differ (such as the place of the data and the time of a job) are overwritten,
    unless `keep`.
    """
    text = f"# {heading}\n{resolved.to_yaml(origins=False)}"
    if path.exists():
        old, new = identity(read(path)), identity(resolved.config)
        differing = [key for key in new if old.get(key) != new[key]]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{path}: is of a run with {key} {old.get(key)}, which is {new[key]} now; another "
                "--out is accepted"
            )
        if keep or path.read_text() == text:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(path: Path) -> Config:
    """The config in a file written by `write`."""
    return load([str(path)], trusted="").config
