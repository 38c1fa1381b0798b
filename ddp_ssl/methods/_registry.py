"""Methods by name: the files of this folder, and classes from outside the package."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ddp_ssl.config import Config
from ddp_ssl.errors import ConfigError, refused
from ddp_ssl.utils.text import one_line, suggest

if TYPE_CHECKING:  # these bring torch
    from ddp_ssl.comm import Comm
    from ddp_ssl.methods.base import Method


def builtin_methods() -> list[str]:
    """Names of the package's methods.

    They are the files of `ddp_ssl/methods`, except `base` and those with a leading underscore.
    """
    files = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(m.name for m in files if m.name != "base" and not m.name.startswith("_"))


def load_method(name: str) -> Any:
    """The method's class, from its file (`simclr`) or from outside (`module:Class`).

    Imports torch. Raises `ConfigError` for a name that is neither.
    """
    names = builtin_methods()
    if ":" not in name and name not in names:
        raise ConfigError(
            f"method.name: unknown method {name!r}{suggest(name, names)}; "
            f"accepted: {', '.join(names)}, or module:Class"
        )
    from ddp_ssl.methods.base import Method  # here, since it brings torch

    if ":" not in name:
        module = importlib.import_module(f"ddp_ssl.methods.{name}")
        (found,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Method)
            and value.__module__ == module.__name__
        )
        return found
    module_name, _, class_name = name.partition(":")
    where = "a module in this folder or on PYTHONPATH is accepted"
    with refused(f"method.name: cannot import {name!r}", where):
        outside = getattr(importlib.import_module(module_name), class_name)
    if not (isinstance(outside, type) and issubclass(outside, Method)):
        raise ConfigError(f"method.name: {name!r} is not a subclass of ddp_ssl.methods.base.Method")
    return outside


def make_method(config: Config, comm: Comm) -> Method[Any]:
    """The configured method, with its batch norms made global.

    Raises `ValueError`, one line, for one that does not fit into memory.
    """
    try:
        method = cast("Method[Any]", load_method(config.method.name)(config, comm))
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise ValueError(
            f"method.name: {config.method.name} does not fit into this machine's memory with these "
            f"settings: {one_line(error, 200)}; smaller widths, queues or numbers of prototypes "
            "are accepted"
        ) from None
    method.finish()
    return method
