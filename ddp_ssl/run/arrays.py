"""What a config of arrays leaves open: channels, mean and deviation, by the images themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ddp_ssl.config import Config, Data
from ddp_ssl.config.views import COLOURS, QUARTERS, views_of
from ddp_ssl.errors import ConfigError
from ddp_ssl.utils.text import one_line

if TYPE_CHECKING:
    from ddp_ssl.data.datasets.array_files import Facts

FLIPPED = 128  # bytes of a pixel that DALI can flip; other types than uint8 are float32 there


def facts_of(data: Data) -> Facts | None:
    """The facts of `data.name=array`; None for other data, and where nothing is there yet."""
    if data.name != "array" or not data.root:
        return None
    from ddp_ssl.data.datasets import array_files  # here, so that other errors do not wait for it
    from ddp_ssl.data.datasets.base import absolute

    if not absolute(data.root).exists():
        return None
    try:
        return array_files.facts(data)
    except ValueError as error:
        raise ConfigError(one_line(error)) from None


def with_statistics(data: Data, facts: Facts) -> Data:
    """`data` with mean and deviation, where they are not given."""
    given = {"mean": data.mean or facts.mean, "std": data.std or facts.std}
    for key, values in given.items():
        if len(values) != facts.channels:
            raise ConfigError(
                f"data.{key}: {len(values)} numbers for images of {facts.channels} channels; "
                "null computes them"
            )
    return data.model_copy(update=given)


def completed(config: Config, origins: Mapping[str, str]) -> tuple[Config, dict[str, str], str]:
    """The config with what the images tell, the origins, and a line that says it.

    Raises `ConfigError` for views that these images cannot have.
    """
    facts = facts_of(config.data)
    if facts is None:
        return config, dict(origins), ""
    check_views(config, facts)
    origin = f"of {facts.sampled} of the {facts.images} images"
    data = with_statistics(config.data, facts)
    added = {f"data.{k}": origin for k in ("mean", "std") if getattr(config.data, k) is None}
    arguments = {"in_chans": facts.channels, **config.model.backbone_args}
    model = config.model
    if arguments["in_chans"] != facts.channels:
        raise ConfigError(
            f"model.backbone_args: in_chans: {arguments['in_chans']}, and {config.data.root} has "
            f"{facts.channels} channels; left out it follows the images"
        )
    if facts.channels != 3 and "in_chans" not in model.backbone_args:
        model = model.model_copy(update={"backbone_args": arguments})
        added["model.backbone_args"] = f"{facts.channels} channels in {config.data.root}"
    line = (
        f"{config.data.root}: {facts.channels} channels of {facts.dtype}, mean {list(facts.mean)}, "
        f"standard deviation {list(facts.std)} ({origin})"
    )
    made = config.model_copy(update={"data": data, "model": model})
    return made, {**origins, **added}, line if added else ""


def check_views(config: Config, facts: Facts) -> None:
    """Raise `ConfigError` for changes of colour of images without, and of too many channels."""
    views = [view for view in views_of(config.data.views) if not view.function]
    flipped = any(view.rotate == QUARTERS or view.vertical_flip_p > 0 for view in views)
    if flipped and facts.channels * (1 if facts.dtype == "uint8" else 4) > FLIPPED:
        raise ConfigError(
            f"data.views: rotate: 90 and vertical_flip_p are for pixels of up to {FLIPPED} bytes, "
            f"and {config.data.root} has {facts.channels} channels of {facts.dtype}; 0 is accepted"
        )
    from ddp_ssl.data.datasets.array_files import has_colours

    if has_colours(facts.channels, facts.dtype):
        return
    on = [key for key in COLOURS if any(getattr(view, key) > 0 for view in views)]
    if on:
        off = [f"data.views.{i}.{key}=0" for i in range(len(config.data.views)) for key in on]
        raise ConfigError(
            f"data.views: {', '.join(on)} are for bytes of 1 or 3 channels, and "
            f"{config.data.root} has {facts.channels} of {facts.dtype}; accepted: {' '.join(off)}"
        )
