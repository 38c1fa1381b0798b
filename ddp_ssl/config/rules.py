"""Combinations of keys that cannot be run. Each message names the key and an accepted value."""

from __future__ import annotations

from ddp_ssl.config.backbones import check_backbone
from ddp_ssl.config.schema import Config
from ddp_ssl.errors import ConfigError
from ddp_ssl.utils import hub
from ddp_ssl.utils.launcher import job_name


def check(config: Config) -> None:
    """Raise `ValueError` for a combination that no method can run."""
    method, views = config.method, config.num_views
    if ":" not in method.name:  # a method from outside may still register its own backbone
        check_backbone(config.model.backbone)
    if views < method.min_views:
        raise ValueError(
            f"data.views: {method.name} compares views of an image and needs at least "
            f"{method.min_views}, got {views}"
        )
    if method.max_views is not None and views > method.max_views:
        raise ValueError(
            f"data.views: {method.name} takes {method.max_views} views at most, got {views}"
        )
    if not method.small_crops and len({group.size for group in config.data.views}) > 1:
        raise ValueError(f"data.views: {method.name} takes views of one size only")
    if config.model.batch_norm == "global" and config.data.batch_size < 2:
        raise ValueError(
            "data.batch_size: batch normalisation needs 2 images or more, got "
            f"{config.data.batch_size}"
        )
    counts: dict[int, int] = {}
    for group in config.data.views:
        counts[group.size] = counts.get(group.size, 0) + group.count
    for size, count in counts.items():
        if count % config.data.view_shards:
            raise ValueError(
                f"data.view_shards: {config.data.view_shards} does not divide the {count} views of "
                f"{size} pixels; {_divisors(*counts.values())} would be accepted"
            )
    planes = config.model.backbone_args.get("in_chans", 3)
    if planes != 3 and config.data.name != "array":
        raise ValueError(
            f"model.backbone_args: in_chans: {planes}, and images of files have 3 channels; "
            "data.name=array is accepted"
        )
    for key in ("mean", "std"):
        values = getattr(config.data, key)
        if values is not None and config.data.name != "array" and len(values) != 3:
            raise ValueError(f"data.{key}: {len(values)} numbers; 3 are accepted, one a channel")
    if config.data.dtype == "float16" and config.optim.precision in ("fp32", "tf32"):
        raise ValueError(
            "data.dtype: float16 images need autocast; float32 or optim.precision=bf16 is accepted"
        )
    size = config.data.central_crop.size
    if config.data.central_crop.resize < size:
        raise ValueError(
            f"data.val_resize: {config.data.val_resize} is smaller than the crop of {size} pixels "
            f"taken from it; {size} or more would be accepted"
        )
    if config.run.resume not in ("never", "") and config.run.init_from:
        raise ValueError("run.init_from: starts anew from weights; run.resume continues: give one")
    if (config.run.init_from or "").startswith(hub.PREFIX):
        raise ValueError(
            f"run.init_from: {config.run.init_from} is no run's; "
            f"model.backbone_args={{pretrained: {config.run.init_from}}} is accepted"
        )


def check_world_size(config: Config, world_size: int) -> None:
    """Raise `ConfigError` unless images and views split evenly over the processes."""
    batch, shares = config.data.batch_size, config.data.view_shards
    if world_size % shares:
        raise ConfigError(
            f"data.view_shards: {shares} does not divide the {world_size} processes; "
            f"{_divisors(world_size)} would be accepted"
        )
    parts = world_size // shares
    over = f"{parts} processes" if shares == 1 else f"{parts} groups of {shares} processes"
    if batch % parts:
        below, above = batch // parts * parts, -(-batch // parts) * parts
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"data.batch_size: {batch} images cannot be split evenly over {over}; "
            f"{nearest} would be accepted"
        )
    if config.model.batch_norm == "local" and batch < 2 * parts:
        raise ConfigError(
            f"data.batch_size: {batch} images over {over} leave one each; a "
            f"local batch norm needs 2; {2 * parts} or model.batch_norm=global is accepted"
        )


def check_folder(config: Config) -> None:
    """Raise `ConfigError` for a run folder that cannot be used, and for one that nobody names."""
    if any("\ud800" <= c <= "\udfff" for c in config.run.dir or ""):
        raise ConfigError(
            f"run.dir: {config.run.dir} is not UTF-8 text, as torch and TensorBoard need it; "
            "accepted: another name, or a locale such as LC_ALL=C.UTF-8"
        )
    if config.run.resume == "auto" and config.run.dir is None and job_name() is None:
        raise ConfigError(
            "run.resume: auto needs run.dir, since no job names the folder here; run.dir=RUN or "
            "ddp-ssl resume RUN is accepted"
        )


def _divisors(*numbers: int) -> str:
    """The common divisors, as words of a message."""
    common = [str(d) for d in range(1, min(numbers) + 1) if not any(n % d for n in numbers)]
    return " or ".join(common) if len(common) < 3 else f"one of {', '.join(common)}"
