"""The tests of this folder build some hundred graphs of DALI."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from nvidia.dali._utils import dali_trace

from ddp_ssl.utils.once import warn_once
from tests.data.images import pack, write

dali_trace.set_tracing(enabled=False)  # of each operator to its line of code: a fifth of the time


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images to train on and 7 to validate on, in three classes."""
    root = tmp_path_factory.mktemp("files")
    for i in range(37):
        kind = ".png" if i % 9 == 0 else ".jpg"
        write(root / ("train" if i < 30 else "val") / f"c{i % 3}" / f"{i:02d}{kind}", i)
    return root


@pytest.fixture(scope="module")
def packed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a module's `files`."""
    out = tmp_path_factory.mktemp("packed") / "out"
    assert pack(files, out) == 0
    return out


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; what is said once is said again."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DDP_SSL_CACHE", str(folder))
    warn_once.cache_clear()
    return folder


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    return shutil.copytree(packed, tmp_path / "copy")
