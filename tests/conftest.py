"""Expensive fixtures: the pool of ranks, a small image folder."""

from __future__ import annotations

import os

# Threads that wait give their core to other processes. The tests start several on few cores.
# OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import Ranks
from tests.runs import Whole

# Where torch cannot use a GPU that is there, the tests mean the CPU.
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A job in a shell's background ignores Ctrl-C, one under nohup SIGHUP too, and so would the
# processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _end(number: int, frame: object) -> None:
    """SIGTERM ends the session as Ctrl-C does, so that fixtures stop what they have started."""
    signal.signal(number, signal.SIG_IGN)  # `timeout` and `make` send it twice
    raise KeyboardInterrupt


signal.signal(signal.SIGTERM, _end)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that form gloo groups of 1 to 4."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def whole(ranks: Ranks, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """`whole(size, *more)`: an uninterrupted run, shared by all tests."""
    return Whole(ranks, photos, tmp_path_factory.mktemp("whole"))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's environment and no log of another test leaks into a test; one seed for all."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__module__ == "ddp_ssl.logs.console"]:
        root.removeHandler(handler)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small JPEG files in four class folders, every one different."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(48):
        label = index % 4
        folder = root / f"class{label}"
        folder.mkdir(exist_ok=True)
        smooth = rng.normal(size=(4, 4, 3)).cumsum(label % 2) * 40 + 60 + 30 * label
        image = Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).resize((24, 20))
        image.save(folder / f"{index:02}.jpg", quality=95)
    return root
