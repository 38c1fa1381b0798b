"""DALI's operators against torchvision's, with given parameters; the bounds are in grey levels."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from ddp_ssl.config.views import RECIPES, CentralCrop, View, views_of
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading import dali, small_images
from ddp_ssl.data.loading.formats import PixelFormat
from ddp_ssl.utils.seeds import hashed
from tests.data.images import HALF, Pixels, array_of, loader_of, picture, write
from tests.data.operators import FACTORS, IMAGES, TURNS, distance, off, reference, run
from tests.helpers import config_of


@pytest.fixture(params=["graph", "small"])
def small_images_from(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images in memory take the graph, and then the way of their own."""
    if request.param == "graph":
        monkeypatch.setattr(small_images, "suits", lambda *_: False)


both_ways = pytest.mark.usefixtures("small_images_from")


# --- one operator at a time ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "bound"),
    [
        ("brightness", FACTORS, 0.5),
        ("contrast", FACTORS, 0.7),
        ("saturation", FACTORS, 0.9),
        ("hue", TURNS, 0.05),
    ],
)
def test_jitter_operators(name: str, values: list[float], bound: float) -> None:
    ours = run(getattr(dali, name), value=values)
    theirs = reference(getattr(tv, f"adjust_{name}"), values)
    assert off(ours, theirs) <= bound  # torchvision rounds down, DALI to the nearest
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_grayscale_and_solarize() -> None:
    assert off(run(dali.grayscale), reference(tv.rgb_to_grayscale)) <= 0.55
    solarized = reference(lambda x: tv.solarize(x, 128.0))
    assert off(run(dali.solarize), solarized) == 0


def test_blur_with_the_same_window() -> None:
    sigmas = [0.1, 0.3, 0.7, 1.0, 1.5, 2.0]

    def blurred(x: Tensor, sigma: float) -> Tensor:
        window = 2 * int(np.ceil(3 * np.float32(sigma))) + 1
        return tv.gaussian_blur(x, [window, window], [sigma, sigma])

    # torchvision rounds, so do we: the odd pixel falls to the other side.
    assert off(run(dali.blur, sigma=sigmas), reference(blurred, sigmas)) <= 0.01


@pytest.mark.parametrize(("size", "bound"), [(32, 0.25), (96, 0.25), (64, 0)])
def test_crop_of_the_whole_image_is_a_bicubic_resize(size: int, bound: float) -> None:
    view = View(size=size, scale=(1, 1), ratio=(1, 1))
    ours = run(lambda x: dali.random_crop(x, view, 1))
    theirs = reference(
        lambda x: tv.resize(x, [size, size], InterpolationMode.BICUBIC, antialias=True)
    )
    assert off(ours, theirs) <= bound


def test_crop_shows_the_part_that_torchvision_would() -> None:
    """On a ramp the crop's box can be read off: its area and ratio follow torchvision's."""
    ramp = np.zeros((256, 256, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256)[:, None], np.arange(256)[None]
    view = View(size=64, scale=(0.2, 0.6), ratio=(0.5, 2.0))
    crops = run(lambda x: dali.random_crop(x, view, 5), np.stack([ramp] * 400)).astype(float)
    height = (crops[:, -1, 32, 0] - crops[:, 0, 32, 0]) * 64 / 63
    width = (crops[:, 32, -1, 1] - crops[:, 32, 0, 1]) * 64 / 63
    area, ratio = height * width / 256**2, width / height
    assert 0.18 < area.min() < 0.22
    assert 0.57 < area.max() < 0.63
    assert abs(area.mean() - 0.39) < 0.02
    assert abs(np.median(np.log(ratio))) < 0.08
    assert 0.47 < ratio.min() < 0.6
    assert 1.7 < ratio.max() < 2.1
    boxes = [
        RandomResizedCrop.get_params(torch.empty(3, 256, 256), [0.2, 0.6], [0.5, 2.0])
        for _ in range(400)
    ]
    # 0.096 would be reached by one of twenty pairs of samples of one distribution.
    assert distance(area, [h * w / 256**2 for _, _, h, w in boxes]) < 0.096
    assert distance(ratio, [w / h for _, _, h, w in boxes]) < 0.096


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 75), (81, 40), (33, 100)])
@pytest.mark.parametrize(("resize", "size"), [(36, 32), (37, 32), (32, 32), (73, 64)])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_central_crop(height: int, width: int, resize: int, size: int, kernel: str) -> None:
    images = np.stack([picture(i, height, width) for i in range(3)])

    def theirs(x: Tensor) -> Tensor:
        x = tv.resize(x, [resize], InterpolationMode(kernel), antialias=True)
        return tv.center_crop(x, [size, size])

    ours = run(lambda x: dali.central_crop(x, CentralCrop(resize, size, kernel)), images)
    assert off(ours, reference(theirs, images=images)) <= 0.3


def test_normalize_and_flip() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours = run(lambda x: dali.normalize(x, PixelFormat(mean, std), 1))
    theirs = reference(
        lambda x: tv.normalize(tv.horizontal_flip(x).float() / 255, list(mean), list(std))
    )
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --- jitter as a whole ---------------------------------------------------------------------------


def jittered(x: Any, mode: str, draws: list[Any]) -> Any:
    return dali.tint(dali.light(x, mode, draws, dali.uniform(0, 24, 1)), mode, draws)


@pytest.mark.parametrize("order", [0, 7, 23])
def test_exact_jitter_applies_the_operators_in_the_drawn_order(order: int) -> None:
    b, c, s = [[0.6, 1.4, 1.0, 0.7, 1.3, 1.2], [1.3, 0.7, 1.2, 1.4, 1.0, 0.6], FACTORS]
    h = [-0.1, -0.05, 0.0, 0.03, 0.07, 0.1]
    places = [order + 0.5] * len(IMAGES)
    ours = run(
        lambda x, b, c, s, h, o: dali.light(x, "exact", [b, c, s, h], o),
        b=b, c=c, s=s, h=h, o=places,
    )  # fmt: skip

    def theirs(x: Tensor, *factors: float) -> Tensor:
        operators = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
        for k in dali.JITTER_ORDERS[order]:
            x = operators[k](x, factors[k])
        return x

    # Hue near gray magnifies a rounding of one grey level: more than one operator alone.
    assert off(ours, reference(theirs, b, c, s, h)) <= 2.0


def test_seq_jitter_without_hue_is_torchvisions_in_that_order() -> None:
    b, c, s = FACTORS, FACTORS[::-1], [1.2] * 6
    ours = run(lambda x, b, c, s: jittered(x, "seq", [b, c, s, None]), b=b, c=c, s=s)

    def theirs(x: Tensor, b: float, c: float, s: float) -> Tensor:
        return tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(x, b), c), s)

    assert off(ours, reference(theirs, b, c, s)) <= 1.5


@pytest.mark.parametrize("mode", ["fast", "seq", "exact"])
def test_jitter_of_strength_zero_changes_nothing(mode: str) -> None:
    view = View(brightness=0, contrast=0, saturation=0, hue=0)
    assert dali.jitter_draws(view, (0,)) == [None] * 4
    ours = run(lambda x: jittered(x, mode, [None] * 4))
    assert (ours == IMAGES).all()


LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
COLOURS: dict[str, Callable[[Tensor], Tensor]] = {
    "luma": lambda x: (x * LUMA).sum(1).mean((1, 2)),
    "contrast": lambda x: (x * LUMA).sum(1).std((1, 2)),
    "chroma": lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),
    "red to blue": lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
    "green to magenta": lambda x: (x[:, 1] - (x[:, 0] + x[:, 2]) / 2).mean((1, 2)),
    "nearly clipped": lambda x: ((x < 3 / 255) | (x > 252 / 255)).float().mean((1, 2, 3)),
}
DRAWS = 1200


@pytest.mark.parametrize(
    ("mode", "bound", "clipping"),
    [("fast", 0.14, 0.29), ("seq", 0.14, 0.26), ("exact", 0.067, 0.067)],
)
@pytest.mark.parametrize("recipe", ["weak", "sym"])
@both_ways
def test_the_distribution_of_colours_is_torchvisions(
    recipe: str, mode: str, bound: float, clipping: float
) -> None:
    """Over many draws of a saturated image, where fixed order and linear hue clip other pixels.

    Two samples of one distribution differ by more than 0.067 in one case of a hundred.
    """
    from torchvision.transforms import v2

    (view,) = RECIPES[recipe]
    view = replace(
        view, size=16, scale=(1, 1), ratio=(1, 1), jitter_p=1.0, gray_p=0, blur_p=0, flip_p=0
    )
    torch.manual_seed(0)
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    image = picture(1, 16, 16)
    x = torch.from_numpy(image).permute(2, 0, 1)
    theirs = torch.stack([jitter(x) for _ in range(DRAWS)]).float() / 255
    loader = loader_of(
        Split.of_array(np.stack([image] * DRAWS)), [view], global_batch=DRAWS, color_jitter=mode,
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    ours = next(loader).views[0]
    distances = {name: distance(f(ours), f(theirs)) for name, f in COLOURS.items()}
    assert distances.pop("nearly clipped") < clipping
    assert max(distances.values()) < bound, distances


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "seq", "exact"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
@both_ways
def test_every_recipe_runs(recipe: str, mode: str) -> None:
    class Group:
        count, size, overrides = 3, 16, {"scale": (0.4, 1.0)}

        def __init__(self) -> None:
            self.recipe = recipe

    views = views_of([Group()])
    batch = next(loader_of(array_of(6), views, color_jitter=mode))
    assert [view.shape for view in batch.views] == [(6, 3, 16, 16)] * 3
    assert not torch.equal(batch.views[0], batch.views[1])
    assert all(view.abs().max() <= 1.0 for view in batch.views)


def test_multiview_crops_by_size_and_can_be_overridden() -> None:
    config = config_of(
        "data.views=[{count: 2, size: 32, recipe: multiview}, {count: 3, size: 16, recipe: "
        "multiview}, {count: 1, size: 16, recipe: multiview, scale: [0.3, 0.4]}]"
    )
    views = views_of(config.data.views)
    assert [view.size for view in views] == [32, 32, 16, 16, 16, 16]
    assert [view.scale for view in views] == [(0.14, 1)] * 2 + [(0.05, 0.14)] * 3 + [(0.3, 0.4)]


@both_ways
def test_probabilities() -> None:
    """Coins fall as often as asked, independently, and 0 and 1 mean never and always."""
    image = picture(2, 8, 8)
    split = Split.of_array(np.stack([image] * 1000))
    still = View(size=8, scale=(1, 1), ratio=(1, 1), jitter_p=0, gray_p=0, blur_p=0, flip_p=0)
    views = [
        View(**{**vars(still), "gray_p": 0.3, "flip_p": 0.25}),
        View(**{**vars(still), "gray_p": 1.0, "flip_p": 1.0}),
        still,
        View(**{**vars(still), "vertical_flip_p": 0.25}),
        View(**{**vars(still), "rotate": 90}),
    ]
    loader = loader_of(split, views, global_batch=1000, mean=(0, 0, 0), std=(1, 1, 1))
    some, always, never, upside, quarters = next(loader).views
    plain = torch.from_numpy(image).permute(2, 0, 1) / 255
    assert torch.allclose(never, plain.expand_as(never))
    gray = (some[:, 0] == some[:, 1]).flatten(1).all(1)
    turned = torch.where(gray[:, None, None, None], always, never.flip(3))
    flipped = (some - turned).abs().flatten(1).amax(1) < 1e-5
    assert abs(gray.float().mean() - 0.3) < 0.05
    assert abs(flipped.float().mean() - 0.25) < 0.05
    assert abs((gray & flipped).float().mean() - 0.075) < 0.04
    assert torch.equal(always[:, 0], always[:, 2])
    for views, expected, share in (
        (upside, plain.flip(1), 0.25), *((quarters, plain.rot90(k, (1, 2)), 0.25) for k in range(4))
    ):  # fmt: skip
        hits = (views - expected).abs().flatten(1).amax(1) < 1e-5
        assert abs(hits.float().mean() - share) < 0.05


@both_ways
def test_seeds_of_operators_are_their_own() -> None:
    """Adding an operator leaves the draws of the others as they are."""
    split = array_of(6)
    plain = View(size=16, gray_p=0, blur_p=0, jitter_p=0)
    more = View(size=16, gray_p=0, blur_p=0, jitter_p=0, solarize_p=1.0)
    one = next(loader_of(split, [plain])).views[0] * 127.5 + 127.5
    two = next(loader_of(split, [more])).views[0] * 127.5 + 127.5
    assert torch.allclose(torch.where(one.round() < 128, one, 255 - one), two, atol=1e-3)
    keys = [hashed(1, 0, name) for name in ("crop", "jitter", "gray", "sigma", "blur", "flip")]
    assert len(set(keys)) == len(keys)


# --- files ---------------------------------------------------------------------------------------


def test_messy_files_decode_to_three_channels(tmp_path: Path) -> None:
    image = Image.fromarray(picture(0, 31, 45))
    sixteen = np.asarray(image.convert("L")).astype(np.uint16) * 257
    forms = {
        "rgb.png": image,
        "rgba.png": image.convert("RGBA"),
        "palette.png": image.convert("P"),
        "gray.png": image.convert("L"),
        "gray.jpg": image.convert("L"),
        "sixteen.png": Image.fromarray(sixteen),
        "cmyk.jpg": image.convert("CMYK"),
        "upper.JPEG": image,
        "x.webp": image,
        "x.bmp": image,
        "x.tif": image,
        "one.png": image.resize((1, 1)),
        "thin.jpg": image.resize((300, 2)),
    }
    for name, form in forms.items():
        form.save(tmp_path / name)
    write(tmp_path / "progressive.jpg")
    image.save(tmp_path / "progressive.jpg", progressive=True)
    turned = Image.Exif()
    turned[0x112] = 6
    image.save(tmp_path / "turned.jpg", exif=turned)
    names = [*forms, "progressive.jpg", "turned.jpg"]
    split = Split.of_files(str(tmp_path), [n.encode() for n in names], np.zeros(len(names)))
    view = View(size=24, scale=(1, 1), ratio=(0.01, 100), jitter_p=0, gray_p=0, blur_p=0, flip_p=0)
    loader = loader_of(split, [view], global_batch=len(names), mean=(0, 0, 0), std=(1, 1, 1))
    batch = next(loader)
    pixels = {names[i]: view for i, view in zip(batch.ids, batch.views[0], strict=True)}
    assert all(view.shape == (3, 24, 24) for view in pixels.values())
    assert torch.equal(pixels["gray.png"][0], pixels["gray.png"][2])
    for name in ("rgb.png", "rgba.png", "x.bmp", "x.tif", "gray.png", "sixteen.png"):
        assert 0.1 < pixels[name].mean() < 0.9


def test_pixels_are_those_of_pil_and_not_turned(tmp_path: Path) -> None:
    buffer, turned = io.BytesIO(), Image.Exif()
    turned[0x112] = 6
    Image.fromarray(picture(3, 20, 20)).save(buffer, "JPEG", exif=turned)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    split = Split.of_files(str(tmp_path), [b"a.jpg"], np.zeros(1))
    view = View(size=20, scale=(1, 1), ratio=(1, 1), jitter_p=0, gray_p=0, blur_p=0, flip_p=0)
    loader = loader_of(split, [view], global_batch=1, mean=(0, 0, 0), std=(1, 1, 1))
    ours = next(loader).views[0][0].permute(1, 2, 0) * 255
    assert off(ours.numpy()[None], expected[None]) < 1e-3


def test_without_dali_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ddp_ssl.data.loading.dali")
    monkeypatch.delattr("ddp_ssl.data.loading.dali")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"^nvidia-dali is not installed: pip install -c constr"):
        loader_of(array_of(6))


def test_images_are_three_channels_everywhere() -> None:
    gray: Pixels = np.stack([picture(i, 16, 16)[..., 0] for i in range(6)])
    batch = next(loader_of(Split.of_array(gray), [View(size=16, jitter_p=0)], mean=HALF))
    assert torch.equal(batch.views[0][:, 0], batch.views[0][:, 1])
