"""The views of small images held in memory, made on a CPU for a whole batch at a time.

At 32 px a DALI graph spends most of its time on starting every operator for every image, and half
of it in the bicubic crop. Here crop, flip and blur are products with one small matrix per image and
axis, and colours are one 3 x 3 matrix per image. Each is done for the batch at once, which takes a
fifth of the processor time. The augmentations, their order and their ranges are those of
`dali.augment`, and the same tests compare both to torchvision. All other cases (files, larger
images, `color_jitter: exact`, a GPU) go through the graph.

There is no state: the random numbers of a batch are a pure function of (seed, view, step), and each
purpose has its own stream. Pixels are float32 in [0, 255].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp_ssl.config.views import QUARTERS, View
from ddp_ssl.data.loading.formats import PixelFormat
from ddp_ssl.utils.seeds import generator

VERSION = "small 1"  # counts changes of the draws and views, as `dali.GRAPH` does for the graph
LARGEST = 64  # side of an image or a view, in pixels: the products grow with its cube
CHUNK = 32  # images at a time: their temporaries stay in the cache, and malloc keeps the pages

Pixels = NDArray[np.uint8]
Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

LUMA = torch.tensor([0.299, 0.587, 0.114])
# Hue and saturation as in `fn.hsv`: a rotation and a scale of I and Q.
RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
YIQ_TO_RGB = torch.linalg.inv(RGB_TO_YIQ)


def suits(
    images: NDArray[Any] | None, views: Sequence[View], color_jitter: str, device: torch.device
) -> bool:
    """Whether views of `images`, `[M, H, W, C]` or None for files, are made here."""
    outside = any(view.function for view in views)  # builds on the graph
    if images is None or images.dtype != np.uint8 or images.shape[3] != 3:
        return False
    if device.type != "cpu" or color_jitter == "exact" or outside:
        return False
    return max(*images.shape[1:3], *(view.size for view in views)) <= LARGEST


def augment(
    pixels: Pixels, view: View, color_jitter: str, form: PixelFormat, key: tuple[int, ...]
) -> Tensor:
    """One random view of each of `pixels` `[n, H, W, 3]`: `[n, S, S, 3]`, normalised.

    `key` names the random streams: (seed, view, step).
    """
    draws = draw(view, pixels.shape[:3], key)
    dtype = torch.float16 if form.half else torch.float32
    out = torch.empty(len(pixels), view.size, view.size, 3, dtype=dtype)
    for first in range(0, len(pixels), CHUNK):
        part = slice(first, first + CHUNK)
        own = Draws(*(value[part] for value in draws))
        x = crop(torch.from_numpy(pixels[part]), view.size, own)
        if view.rotate > 0:
            x = turned(x, view.rotate == QUARTERS, own.angle)
        x = recolor(x, view, color_jitter, own)
        if view.blur_p > 0:
            blur_(x, own)
        if view.solarize_p > 0:
            x = torch.where(planes(own.solarize), torch.minimum(x, 255.0 - x), x)
        normalize(x, form, out[part])
    return out


# --- random numbers ------------------------------------------------------------------------------


class Draws(NamedTuple):
    """The random numbers for a view of each of n images, each `[n]`; see `View` for the ranges."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    """The crop's, in whole pixels of the image."""
    jitter: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    """In turns."""
    gray: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor
    flip: Tensor
    vertical_flip: Tensor
    angle: Tensor
    """In degrees, counter-clockwise."""


def draw(view: View, shape: Sequence[int], key: tuple[int, ...]) -> Draws:
    """The draws for images of `shape` (n, H, W)."""
    n, rows, columns = shape

    def uniform(low: float, high: float, name: str) -> Tensor:
        values = generator(*key, name).uniform(low, high, n)
        return torch.from_numpy(values.astype(np.float32))

    def coin(probability: float, name: str) -> Tensor:
        return torch.from_numpy(generator(*key, name).random(n) < probability)

    def factor(name: str) -> Tensor:
        strength = getattr(view, name)
        return uniform(max(0.0, 1 - strength), 1 + strength, name)

    angle = uniform(-view.rotate, view.rotate, "rotate")
    if view.rotate == QUARTERS:
        angle = torch.from_numpy(generator(*key, "rotate").integers(0, 4, n) * 90.0)
    top, left, height, width = crop_boxes(view, n, rows, columns, generator(*key, "crop"))
    return Draws(
        top=torch.from_numpy(top),
        left=torch.from_numpy(left),
        height=torch.from_numpy(height),
        width=torch.from_numpy(width),
        jitter=coin(view.jitter_p, "jitter"),
        brightness=factor("brightness"),
        contrast=factor("contrast"),
        saturation=factor("saturation"),
        hue=uniform(-view.hue, view.hue, "hue"),
        gray=coin(view.gray_p, "gray"),
        blur=coin(view.blur_p, "blur"),
        sigma=uniform(*view.blur_sigma, "sigma"),
        solarize=coin(view.solarize_p, "solarize"),
        flip=coin(view.flip_p, "flip"),
        vertical_flip=coin(view.vertical_flip_p, "vertical flip"),
        angle=angle,
    )


def crop_boxes(
    view: View, n: int, height: int, width: int, random: np.random.Generator
) -> tuple[Integers, Integers, Integers, Integers]:
    """torchvision's RandomResizedCrop: top, left, height and width of `n` crops, each `[n]`.

    The first of ten boxes that fits, or else the largest central one of an allowed ratio.
    """
    area = height * width * random.uniform(*view.scale, (n, 10))
    low, high = view.ratio
    ratio = np.exp(random.uniform(math.log(low), math.log(high), (n, 10)))
    h, w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.argmax(1)[:, None]
    h, w = (np.take_along_axis(side, first, 1)[:, 0].astype(np.int64) for side in (h, w))
    top = (random.random(n) * (height - h + 1)).astype(np.int64)
    left = (random.random(n) * (width - w + 1)).astype(np.int64)
    none = ~fits.any(1)
    h[none] = min(height, round(width / low))
    w[none] = min(width, round(height * high))
    top[none], left[none] = (height - h[none]) // 2, (width - w[none]) // 2
    return top, left, h, w


# --- operators: float32 [n, 3, S, S] -------------------------------------------------------------


def planes(values: Tensor) -> Tensor:
    """`[n]` to `[n, 1, 1, 1]`."""
    return values[:, None, None, None]


def crop(pixels: Tensor, size: int, draws: Draws) -> Tensor:
    """Cropped, resized (bicubic, antialiased) and mirrored: uint8 `[n, H, W, 3]` to `[n, 3, S, S]`.

    Rounded to whole numbers, as in torchvision and DALI.
    """
    n, height, width, _ = pixels.shape
    rows = resampling(height, size)[spans(draws.top, draws.height, height)]
    columns = resampling(width, size)[spans(draws.left, draws.width, width)]
    columns = torch.where(draws.flip[:, None, None], columns.flip(1), columns)
    if draws.vertical_flip.any():
        rows = torch.where(draws.vertical_flip[:, None, None], rows.flip(1), rows)
    # [n, H, 3, W], so that each axis in turn is a factor's inner one.
    x = pixels.permute(0, 1, 3, 2).contiguous().to(torch.float32)
    x = torch.bmm(rows, x.view(n, height, 3 * width))
    x = torch.bmm(x.view(n, size * 3, width), columns.transpose(1, 2))
    x = x.view(n, size, 3, size).transpose(1, 2).contiguous()
    return x.round_().clamp_(0.0, 255.0)


def turned(x: Tensor, quarters: bool, angle: Tensor) -> Tensor:
    """Each image by its angle, bilinear, the border's pixels repeated; quarter turns exactly."""
    if quarters:
        for turns in (1, 2, 3):
            part = angle == 90 * turns
            x[part] = torch.rot90(x[part], turns, (2, 3))
        return x
    radians = torch.deg2rad(angle)
    cos, sin, zero = torch.cos(radians), torch.sin(radians), torch.zeros_like(radians)
    back = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(back, list(x.shape), align_corners=False)
    x = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return x.round_()


def spans(start: Tensor, length: Tensor, side: int) -> Tensor:
    """The index in `resampling(side, ...)` of the pixels [start, start + length)."""
    return (length - 1) * side - (length - 1) * (length - 2) // 2 + start


@functools.lru_cache(maxsize=8)
def resampling(side: int, size: int) -> Tensor:
    """Weights `[side (side + 1) / 2, size, side]` that resize any part of a row of `side` pixels.

    The parts are ordered by length, then by start; their weights are 0 outside of them. The kernel
    is PIL's bicubic (Keys, a = -1/2), as wide as the pixels of the smaller of part and result.
    """
    tables = []
    for length in range(1, side + 1):
        scale = max(length / size, 1.0)
        center = (np.arange(size) + 0.5) * length / size
        t = np.abs(np.arange(length) + 0.5 - center[:, None]) / scale
        near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
        weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
        weights /= weights.sum(1, keepdims=True)
        table = np.zeros((side - length + 1, size, side), np.float32)
        for start in range(side - length + 1):
            table[start, :, start : start + length] = weights
        tables.append(table)
    return torch.from_numpy(np.concatenate(tables))


def recolor(x: Tensor, view: View, mode: str, draws: Draws) -> Tensor:
    """Jitter and gray as in `dali.recolor`, for the images that were drawn."""
    if view.jitter_p > 0:
        identity = torch.ones(())
        b, c = (torch.where(draws.jitter, f, identity) for f in (draws.brightness, draws.contrast))
        x = light_(x, mode, planes(b), planes(c))
    if view.jitter_p > 0 or view.gray_p > 0:
        matrix = torch.where(draws.jitter[:, None, None], tint(draws), torch.eye(3))
        matrix = torch.where(draws.gray[:, None, None], LUMA.expand(3, 3), matrix)
        x = torch.bmm(matrix, x.flatten(2)).view_as(x).clamp_(0.0, 255.0)
    return x


def light_(x: Tensor, mode: str, b: Tensor, c: Tensor) -> Tensor:
    """Brightness and contrast, in place: about the mean of the gray image, or (`fast`) 128."""
    if mode == "fast":
        return x.mul_(b * c).add_(128.0 * b * (1.0 - c)).clamp_(0.0, 255.0)
    assert mode == "seq"
    x = x.mul_(b).clamp_(0.0, 255.0)
    mean = planes(x.mean((2, 3)) @ LUMA)
    return x.mul_(c).add_(mean * (1.0 - c)).clamp_(0.0, 255.0)


def tint(draws: Draws) -> Tensor:
    """Saturation and hue as a matrix for each image, `[n, 3, 3]`."""
    angle = 2.0 * math.pi * draws.hue
    cos, sin = draws.saturation * torch.cos(angle), draws.saturation * torch.sin(angle)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    turned = torch.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], 1).view(-1, 3, 3)
    return torch.matmul(YIQ_TO_RGB, torch.matmul(turned, RGB_TO_YIQ))


def blur_(x: Tensor, draws: Draws) -> None:
    """Gaussian with a window of 2 ceil(3 sigma) + 1, in place, for the images that were drawn."""
    n, size = int(draws.blur.sum()), x.shape[-1]
    if n == 0:
        return
    sigma = draws.sigma[draws.blur][:, None]
    radius = torch.ceil(3.0 * sigma)
    reach = int(radius.max())
    away = torch.arange(-reach, reach + 1.0)
    weights = torch.exp(-0.5 * (away / sigma) ** 2) * (away.abs() <= radius)
    weights = weights / weights.sum(1, keepdim=True)
    matrix = (weights @ shifts(size, reach).flatten(1)).view(n, size, size)
    y = torch.bmm(x[draws.blur].view(n, 3 * size, size), matrix.transpose(1, 2))
    x[draws.blur] = torch.matmul(matrix[:, None], y.view(n, 3, size, size))


@functools.lru_cache(maxsize=8)
def shifts(size: int, reach: int) -> Tensor:
    """`[2 reach + 1, size, size]`: for d from -reach to reach, the matrix that shifts a row by d.

    Beyond the border the image is mirrored about its last pixel.
    """
    away = torch.arange(-reach, reach + 1)[:, None]
    period = max(2 * size - 2, 1)
    at = (torch.arange(size) + away) % period
    return torch.nn.functional.one_hot(torch.minimum(at, period - at), size).to(torch.float32)


def normalize(x: Tensor, form: PixelFormat, out: Tensor) -> None:
    """To HWC, less the mean, over the standard deviation; into `out` `[n, S, S, 3]`."""
    mean, std = (255.0 * torch.tensor(v, dtype=torch.float32)[:, None, None]
                 for v in (form.mean, form.std))  # fmt: skip
    out.copy_(x.sub_(mean).div_(std).permute(0, 2, 3, 1))
