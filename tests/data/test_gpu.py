"""The pipeline on a GPU against the same pipeline on the CPU; the bounds are in grey levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddp_ssl.config.views import CentralCrop, View
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.formats import Decoding
from tests.data.bad import BAD, IMAGES, victim
from tests.data.images import array_of, eval_of, folder_of, loader_of, through_a_file, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU: dict[str, Any] = {"device": torch.device("cuda", 0)}
STILL: dict[str, Any] = {
    "size": 64, "jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0, "flip_p": 0.0,
}  # fmt: skip
OPERATORS: dict[str, tuple[dict[str, Any], float]] = {
    "crop": ({}, 1.0),
    "flip": ({"flip_p": 0.5, "vertical_flip_p": 0.5}, 1.0),
    "quarter turns": ({"rotate": 90}, 1.0),
    "turns": ({"rotate": 30}, 1.5),
    "brightness": ({"jitter_p": 1.0, "contrast": 0, "saturation": 0, "hue": 0}, 1.5),
    "contrast": ({"jitter_p": 1.0, "brightness": 0, "saturation": 0, "hue": 0}, 1.5),
    "saturation": ({"jitter_p": 1.0, "brightness": 0, "contrast": 0, "hue": 0}, 1.5),
    "hue": ({"jitter_p": 1.0, "brightness": 0, "contrast": 0, "saturation": 0}, 1.5),
    "gray": ({"gray_p": 1.0}, 1.5),
    "blur": ({"blur_p": 1.0}, 1.0),
    "everything": ({"jitter_p": 0.8, "gray_p": 0.2, "blur_p": 0.5, "flip_p": 0.5}, 3.0),
}


def levels(view: torch.Tensor) -> torch.Tensor:
    return view.float().cpu() * 127.5 + 127.5


@pytest.fixture(scope="module")
def photos_224(tmp_path_factory: pytest.TempPathFactory) -> Split:
    root = tmp_path_factory.mktemp("photos")
    names = [f"{i:02d}.jpg" for i in range(24)]
    for i, name in enumerate(names):
        write(root / name, i, height=375, width=500)
    return Split.of_files(str(root), [name.encode() for name in names], np.arange(24))


@pytest.mark.parametrize("mode", ["fast", "seq", "exact"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_views_are_the_cpus(photos_224: Split, operator: str, mode: str) -> None:
    """The same draws, so the same views up to rounding and the decoder."""
    settings, bound = OPERATORS[operator]
    views = [View(**{**STILL, **settings})]
    ours = loader_of(photos_224, views, color_jitter=mode, global_batch=24, **GPU)
    theirs = loader_of(photos_224, views, color_jitter=mode, global_batch=24)
    for _ in range(2):
        a, b = next(ours), next(theirs)
        assert a.views[0].is_cuda
        assert a.labels.is_cuda
        assert a.ids.is_pinned()
        assert torch.equal(a.ids.cpu(), b.ids)
        assert (levels(a.views[0]) - levels(b.views[0])).abs().mean() <= bound


def test_evaluation_is_the_cpus(photos_224: Split) -> None:
    ours = list(eval_of(photos_224, np.arange(24), crop=CentralCrop(73, 64), **GPU))
    theirs = list(eval_of(photos_224, np.arange(24), crop=CentralCrop(73, 64)))
    for a, b in zip(ours, theirs, strict=True):
        assert (levels(a.views[0]) - levels(b.views[0])).abs().mean() <= 1.0


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["files", "array"])
def test_views_are_channels_last_without_a_copy(tmp_path: Path, kind: str, half: bool) -> None:
    split = folder_of(tmp_path, 20) if kind == "files" else array_of(20)
    loader = loader_of(split, half=half, **GPU)
    for _ in range(4):
        for view in next(loader).views:
            assert view.dtype == (torch.float16 if half else torch.float32)
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert view._base is not None  # a permutation of DALI's own buffer


def test_a_kept_batch_stays_as_it_was(photos_224: Split) -> None:
    loader = loader_of(photos_224, **GPU)
    kept = next(loader)
    copies = [view.clone() for view in kept.views]
    for _ in range(8):
        next(loader)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(kept.views, copies, strict=True))


@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_the_decoders_share_and_the_hints_change_little(photos_224: Split, load: float) -> None:
    views = [View(**STILL)]
    hints = Decoding(load, (512, 512))
    ours = next(loader_of(photos_224, views, global_batch=24, decoding=hints, **GPU))
    theirs = next(loader_of(photos_224, views, global_batch=24))
    assert (levels(ours.views[0]) - levels(theirs.views[0])).abs().mean() <= 1.0


@pytest.mark.parametrize("step", [0, 2, 5])
def test_resuming_is_exact(photos_224: Split, step: int) -> None:
    going = loader_of(photos_224, **GPU)
    for _ in range(step):
        next(going)
    resumed = loader_of(photos_224, prefetch=3, **GPU)
    assert resumed.load_state(through_a_file(going.state()), step) is None
    for _ in range(4):
        a, b = next(going), next(resumed)
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_replaced(tmp_path: Path, kind: str) -> None:
    good, split = (folder_of(tmp_path / name, IMAGES) for name in ("good", "bad"))
    hit = {victim(1, 2), victim(3, 0)}
    for i in hit:
        BAD[kind][0](Path(split.where(i)))
    bad = BadImages()
    ours, theirs = loader_of(split, bad=bad, **GPU), loader_of(good, **GPU)
    for _ in range(6):
        a, b = next(ours), next(theirs)
        same = torch.tensor([int(i) not in hit for i in b.ids])
        assert torch.equal(a.ids[same], b.ids[same])
        for x, y in zip(a.views, b.views, strict=True):
            assert torch.equal(x[same.cuda()], y[same.cuda()])
    assert set(bad.known) == {split.where(i) for i in hit}
