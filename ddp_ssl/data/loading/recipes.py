"""Views that a function from outside the package makes: `recipe: module:function`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_ssl.errors import ConfigError, reason, refused
from ddp_ssl.utils.seeds import hashed

ACCEPTED = "a function of a module in this folder or on PYTHONPATH is accepted"


def load_recipe(name: str) -> Callable[..., Any]:
    """The function `module:function`; raises `ConfigError`."""
    module, _, function = name.partition(":")
    with refused(f"data.views: cannot import the recipe {name}", ACCEPTED):
        found = getattr(importlib.import_module(module), function)
    if not inspect.isfunction(found):
        raise ConfigError(f"data.views: the recipe {name} is not a function; {ACCEPTED}")
    made: Callable[..., Any] = found
    return made


def digest(name: str) -> str:
    """SHA-256 of the source of the function's module; its own imports are not looked at."""
    with refused(f"data.views: the source of the recipe {name} cannot be read", ACCEPTED):
        source = Path(inspect.getfile(load_recipe(name))).read_bytes()
    return hashlib.sha256(source).hexdigest()[:12]


def mistake(name: str, error: Exception) -> str:
    """An error of a recipe as one line; DALI rewrites its functions and keeps their places."""
    known = getattr(error, "ag_error_metadata", None)
    if known is None:
        return reason(error)
    file = inspect.getfile(load_recipe(name))
    lines = [frame.lineno for frame in known.translated_stack if frame.filename == file]
    return f"{known.cause_message}" + (f" ({Path(file).name}, line {lines[0]})" if lines else "")


def seed_of(key: tuple[int, ...], name: str) -> int:
    """The seed of the operator that a recipe calls `name`, in the view `key`."""
    return hashed(*key, "recipe", name)
