"""The format of decoded images and of views. No torch, no DALI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class PixelFormat(NamedTuple):
    """Normalisation of the views, for pixels in [0, 1], and whether they are float16.

    `unit` is the value of a pixel that counts as 1.
    """

    mean: Sequence[float]
    std: Sequence[float]
    half: bool = False
    unit: float = 255.0


class Decoding(NamedTuple):
    """Decoding on a GPU: the hardware's share of the JPEGs, and the largest width and height."""

    hw_load: float = 0.65
    preallocate: tuple[int, int] | None = None
