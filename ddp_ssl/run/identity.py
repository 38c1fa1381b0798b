"""The identity of a run: the settings and images that must be the same when it is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_ssl.config import Config, ConfigError
from ddp_ssl.config.schema import SAME_AS
from ddp_ssl.config.text import flow
from ddp_ssl.data.datasets.split import UNNAMED, not_compared

if TYPE_CHECKING:
    from ddp_ssl.data.datasets.base import Dataset

# Keys that may change when a run is resumed. All others belong to its identity.
FREE_ON_RESUME = (
    "run.*",
    "checkpoint.*",
    "eval.*",
    "measure.*",
    "log.*",
    "model.checkpointing",
    "optim.accumulate",
    "data.root",
    "data.stage",
    "data.stage_gb",
    "data.columns",
    "data.files",
    "data.val_files",
    "data.skip",
    "data.view_shards",
    "data.threads",
    "data.prefetch",
    "data.read_threads",
    "data.hw_decoder_load",
    "data.preallocate",
    "data.max_bad_fraction",
    "data.max_pixels",
)
NOT_FREE = ("run.seed",)
# Settings of earlier versions, with the value that means what is done now.
GONE = {"data.reader": "indexed", "data.url": "null"}


def free_on_resume(key: str) -> bool:
    """Whether a dotted key may change when a run is resumed."""
    return key not in NOT_FREE and any(fnmatchcase(key, free) for free in FREE_ON_RESUME)


def identity(config: Config) -> dict[str, str]:
    """The settings that must be the same on resume: dotted key to value as text."""
    return bound_settings(config.model_dump(mode="json")) | {
        "data.name": flow(SAME_AS.get(config.data.name, config.data.name))
    }


def bound_settings(tree: Mapping[str, Any]) -> dict[str, str]:
    """Those of a config's settings, by section and key, that may not change on resume, as text."""
    return {
        f"{section}.{key}": flow(value)
        for section, values in tree.items()
        for key, value in values.items()
        if not free_on_resume(f"{section}.{key}")
    }


def whole_identity(config: Config, data: Dataset) -> dict[str, str]:
    """The identity of the config, and digests of the images: of names and labels, of labels.

    In containers that have checksums, of these too.
    """
    digests = {"classes": hashlib.sha256(repr(data.class_names).encode()).hexdigest()}
    for name, split in (("train", data.train), ("validation", data.val)):
        images, labels = ("none", "none") if split is None else split.identity
        digests |= {f"{name} images": images, f"{name} labels": labels}
        if split is not None and (contents := split.contents) is not None:
            digests[f"{name} contents in {contents[0]}"] = contents[1]
    return identity(config) | {
        name: digest if digest == UNNAMED else digest[:12] for name, digest in digests.items()
    }


def check_identity(now: dict[str, str], saved: dict[str, str], path: Path) -> None:
    """Raise `ConfigError` if the checkpoint belongs to another experiment.

    A setting that the checkpoint does not know counts as null. So the null of a new setting must
    mean the behaviour before that setting existed. Where one of the two has no names of images,
    their labels and classes decide; earlier checkpoints have names and know no digest of the rest.
    What the images contain is compared where both are in a container of the same kind.
    """
    if (name := saved.get("data.name")) in SAME_AS:  # earlier versions saved a list as such
        saved = saved | {"data.name": SAME_AS[name]}
    saved = {key: value for key, value in saved.items() if GONE.get(key) != value}
    off = {key: value for key, value in now.items() if value == "null"}
    for name in ("train", "validation"):
        out = not_compared(f"{name} images", f"{name} labels", saved, now)
        saved, now = ({k: v for k, v in x.items() if k != out} for x in (saved, now))
    both = {key for key in saved if key in now or " contents in " not in key}
    saved = {key: value for key, value in saved.items() if key in both}
    now = {k: v for k, v in now.items() if k in both or " contents in " not in k}
    if "classes" not in saved:
        now = {key: value for key, value in now.items() if key != "classes"}
    # Earlier versions may have counted a setting that is free now.
    bound = {key: value for key, value in saved.items() if not free_on_resume(key)}
    differing = compare_identity(off | bound, now)
    if differing:
        raise ConfigError(
            f"run.resume: {path} is another experiment: {'; '.join(differing)}; "
            "run.init_from takes its weights alone"
        )


def compare_identity(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Differences, one line each: `optim.lr: 0.4 in the checkpoint, 0.1 now`."""
    keys = [*saved, *(key for key in now if key not in saved)]
    return [
        f"{key}: {saved.get(key, 'not set')} in the checkpoint, {now.get(key, 'not set')} now"
        for key in keys
        if saved.get(key) != now.get(key)
    ]
