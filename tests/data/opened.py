"""Data sets as a config names them: opened, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddp_ssl.config import Data
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.split import Split


def loaded(root: Path | str, name: str = "folder", **keys: Any) -> Dataset:
    return registry.load(Data(name=name, root=str(root), **keys), 0)


def refused(root: Path | str, name: str = "folder", **keys: Any) -> str:
    """The error, one line that begins with a key."""
    with pytest.raises(ValueError, match=r"^data\.") as caught:
        loaded(root, name, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(split: Split) -> list[bytes]:
    return [split.read(i).tobytes() for i in range(len(split))]
