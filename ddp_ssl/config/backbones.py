"""Names of timm's models, from its source: to import timm takes as long as to import torch."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Collection
from pathlib import Path

from ddp_ssl.utils.text import suggest

HUBS = ("hf_hub:", "hf-hub:", "local-dir:", "local_dir:")
MODEL = re.compile(r"^@register_model\b.*?^def (\w+)", re.MULTILINE | re.DOTALL)
RENAMED = re.compile(r"^register_model_deprecations\(\w+, \{(.*?)^\}", re.MULTILINE | re.DOTALL)
OLD_NAME = re.compile(r"""^\s*['"](\w+)['"]\s*:""", re.MULTILINE)


def check_backbone(name: str) -> None:
    """Raise `ValueError` unless timm has a model of this name, with or without a tag."""
    if name.startswith(HUBS):
        raise ValueError(
            f"model.backbone: {name} is a place of weights, not a model; the name of one of timm's "
            "models is accepted, and model.backbone_args={pretrained: true} fetches its weights, "
            "{pretrained: hf-hub:USER/NAME} those of the hub"
        )
    models, renamed = timm_models()
    if models and name.partition(".")[0] not in {*models, *renamed}:
        family = name.partition("_")[0]  # other tools have another order of the parts
        kin = [model for model in models if family in model.split("_")]
        hint = suggest(name, kin, 0.1) if kin else suggest(name, models)
        raise ValueError(f"model.backbone: timm has no model {name!r}{hint}")


def timm_models() -> tuple[Collection[str], Collection[str]]:
    """Names of timm's models, and old names that it accepts too; none where timm is not installed.

    Once timm has been imported, it is asked itself: a method's file may have registered a model.
    """
    registry = sys.modules.get("timm.models._registry")
    if registry is not None:
        return registry.list_models(), registry.get_deprecated_models()
    return _in_source()


@functools.cache
def _in_source() -> tuple[Collection[str], Collection[str]]:
    found = importlib.util.find_spec("timm")
    models: set[str] = set()
    renamed: set[str] = set()
    for file in Path(found.origin).parent.glob("models/*.py") if found and found.origin else ():
        text = file.read_text(encoding="utf-8")
        models.update(MODEL.findall(text))
        for block in RENAMED.findall(text):
            renamed.update(OLD_NAME.findall(block))
    return models, renamed
