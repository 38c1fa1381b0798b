"""Another method than a YAML's: what of the YAML stays, and what the method's recipe gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ddp_ssl.config.files import FOLDER, PRESETS
from ddp_ssl.config.schema import MethodConfig
from ddp_ssl.config.views import ViewGroup

# Keys that belong to a method's recipe, so that another method does not take them over.
HEAD = ("projector", "projector_norm", "projector_bias", "views_forward")
# Keys of `optim` that say how long and in which numbers a run computes, whatever its method.
KEPT_OF_OPTIM = ("epochs", "precision", "gradient_compression")


def named(tree: Mapping[str, Any]) -> str:
    """`method.name` of a tree."""
    return str((tree.get("method") or {}).get("name", MethodConfig.model_fields["name"].default))


def sibling(path: Path, own: str, name: str) -> Path | None:
    """The project's config `D/NAME.yaml` in place of its `D/OWN.yaml`, a method for another.

    A config of another name has more to it than its method, such as the backbone; it has none.
    """
    if FOLDER.resolve() not in path.resolve().parents or ":" in name or path.stem != own:
        return None
    other = path.with_name(f"{name}.yaml")
    return other if other.is_file() else None


def adapted(
    tree: Mapping[str, Any], path: Path, method: type[MethodConfig]
) -> tuple[dict[str, Any], list[str]]:
    """The part of a YAML's tree that holds for another method, and the keys that are dropped.

    Run, data, backbone, epochs, evaluation and log stay. So do number and sizes of `data.views`. A
    preset's `optim` stays too: it is a choice for the data, measured on pictures.
    """
    kept = {section: dict(values) for section, values in tree.items() if values is not None}
    dropped = [f"method.{key}" for key in kept.pop("method", {}) if key != "name"]
    optim = () if path.resolve().parent == PRESETS.resolve() else kept.get("optim", ())
    left = {"model": HEAD, "optim": [key for key in optim if key not in KEPT_OF_OPTIM]}
    for section, keys in left.items():
        given = [key for key in keys if kept.get(section, {}).pop(key, None) is not None]
        dropped += [f"{section}.{key}" for key in given]
    if "views" in kept.get("data", {}):
        before = kept["data"]["views"]
        kept["data"]["views"] = _views(before, method)
        if kept["data"]["views"] != before:
            dropped.append("data.views' recipes")
    return kept, dropped


def _views(groups: Collection[Any], method: type[MethodConfig]) -> list[dict[str, Any]]:
    """Groups of the same number and sizes with the method's own recipe.

    A method that takes one size only keeps the largest.
    """
    given = method.recipe.get("data", {}).get("views", [{}])
    recipe = given[0].get("recipe", ViewGroup().recipe)
    checked = [ViewGroup.model_validate(group) for group in groups]
    largest = max(group.size for group in checked)
    return [
        {"count": group.count, "size": group.size, "recipe": recipe}
        for group in checked
        if method.small_crops or group.size == largest
    ]
