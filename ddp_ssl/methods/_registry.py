"""Methods by name."""

from __future__ import annotations

from typing import Any, cast

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, load_method
from ddp_ssl.methods.base import Method


def make_method(config: Config, comm: Comm) -> Method[Any]:
    """The configured method, its batch norms global."""
    method = cast(Method[Any], load_method(config.method.name)(config, comm))
    method.finish()
    return method
