"""Whether an encoded image decodes: a fast check of its markers, and the decoder itself.

The markers are right for all but damaged files and a few rare formats, so that only what they
reject has to be decoded.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.formats import Decoding

Bytes = NDArray[np.uint8]

# What DALI decodes, by PIL's names. PIL opens more than that.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")


def looks_whole(encoded: Bytes) -> bool:
    """Whether this begins and ends like a JPEG or a PNG (uint8 `[length]`)."""
    start, end = encoded[:8].tobytes(), encoded[-12:].tobytes()
    if start[:3] == b"\xff\xd8\xff":
        return end[-2:] == b"\xff\xd9"
    return start == b"\x89PNG\r\n\x1a\n" and end[4:8] == b"IEND"


# Formats whose end says nothing: the decoder will.
STARTS = (b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")


def worth_trying(encoded: Bytes) -> bool:
    """Whether the training pipeline may have it: whole by its markers, or a format without any."""
    return looks_whole(encoded) or encoded[:8].tobytes().startswith(STARTS)


class Decoder:
    """Decodes single images as the training pipeline does. Not for several threads at once."""

    def __init__(self, device_id: int | None = None, decoding: Decoding | None = None) -> None:
        self._how = device_id, decoding or Decoding()
        self._pipe: Any = None

    def problem(self, encoded: Bytes) -> str | None:
        """Why DALI cannot decode it, in a few words; None if it can."""
        from ddp_ssl.data import pipeline

        if not len(encoded):
            return "empty"
        if self._pipe is None:
            self._pipe = pipeline.decoder(*self._how)
        try:
            self._pipe.feed_input("encoded", [encoded])
            self._pipe.run()
        except RuntimeError as error:
            self._pipe = None  # an error leaves it in no state to go on
            return why(encoded) or telling(error)
        return None


def why(encoded: Bytes) -> str | None:
    """What PIL finds wrong with an image that does not decode, in a few words."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            if image.format not in FORMATS:
                return f"{image.format} is not supported"
            image.load()
    except Exception as error:
        return "not an image" if "cannot identify" in str(error) else first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def telling(error: BaseException) -> str:
    """The line of one of DALI's messages that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "fail" in line] or lines
    return f"DALI stopped: {telling[-1] if telling else type(error).__name__}"
