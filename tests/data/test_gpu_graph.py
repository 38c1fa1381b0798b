"""The pipelines for a GPU, defined and serialised without one. tests/data/test_gpu.py runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from nvidia.dali import backend

from ddp_ssl.config.views import CentralCrop, View
from ddp_ssl.data.loading import dali
from ddp_ssl.data.loading.formats import Decoding, PixelFormat
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings

SETTINGS = LoaderSettings(
    PixelFormat((0.5,) * 3, (0.5,) * 3, True), torch.device("cuda", 0), 1,
    decoding=Decoding(0.65, (512, 512)),
)  # fmt: skip
VIEW = View(size=64, jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.2, flip_p=0.5)
REGISTERED = {
    "cpu": set(backend.RegisteredCPUOps()),
    "gpu": set(backend.RegisteredGPUOps()),
    "mixed": set(backend.RegisteredMixedOps()),
}


TURNED = {turn: replace(VIEW, rotate=turn, vertical_flip_p=0.5) for turn in (20, 90)}


BARE = replace(TURNED[90], jitter_p=0, gray_p=0, solarize_p=0)
FIVE = replace(SETTINGS, form=PixelFormat((0.5,) * 5, (0.5,) * 5, unit=1.0))


def train(reading: Any, mode: str, view: View = VIEW, settings: LoaderSettings = SETTINGS) -> Any:
    return dali.train_iterator(reading, Augmentation([view], mode), settings, seed=1, batch_size=4)


def evaluate(reading: Any, settings: LoaderSettings = SETTINGS) -> Any:
    return dali.eval_iterator(reading, CentralCrop(73, 64), settings, batch_size=4)


def source(info: Any) -> Any:
    return [np.zeros(10, np.uint8)] * 4, np.zeros((4, 1), np.int64)


FILES = functools.partial(dali.read, source, True, SETTINGS.decoding)
ARRAY = functools.partial(dali.read, source, False, SETTINGS.decoding)
BANDS = functools.partial(dali.read, source, False, SETTINGS.decoding, "uint16")
GRAPHS: dict[str, tuple[Callable[[], Any], int]] = {
    "files, fast": (lambda: train(FILES, "fast"), 50),
    "files, seq": (lambda: train(FILES, "seq"), 60),
    "files, exact": (lambda: train(FILES, "exact"), 450),
    "files, turned": (lambda: train(FILES, "seq", TURNED[20]), 65),
    "files, turned by quarters": (lambda: train(FILES, "seq", TURNED[90]), 80),
    "an array": (lambda: train(ARRAY, "seq"), 60),
    "an array of five channels": (lambda: train(BANDS, "seq", BARE, FIVE), 60),
    "evaluation, five channels": (lambda: evaluate(BANDS, FIVE), 60),
    "evaluation, files": (lambda: evaluate(FILES), 60),
    "evaluation, an array": (lambda: evaluate(ARRAY), 60),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_for_a_gpu_is_one_that_dali_takes(name: str) -> None:
    make, most = GRAPHS[name]
    with patch.object(dali, "_iterator", lambda pipe, views: pipe):
        pipe = make()
    pipe._build_graph()
    for operator in pipe._ops:
        kind, device = operator._op.schema.Name(), operator._op.device
        assert kind in REGISTERED[device], (kind, device)
        operator.check_args()
        if name.startswith("evaluation"):
            # A constant of the host on the GPU would be copied back, and the copy waited for.
            assert (kind, device) != ("Constant", "gpu")
    assert len(pipe._ops) <= most
    *views, ids = pipe._graph_outputs if hasattr(pipe, "_graph_outputs") else pipe._graph_out
    assert [view.device for view in views] == ["gpu"]
    assert ids.device == "cpu"
    # Without a driver DALI adds the operators, and checks their inputs, for the host's executor.
    pipe._device_id = None
    assert len(pipe.serialize()) > 1000
