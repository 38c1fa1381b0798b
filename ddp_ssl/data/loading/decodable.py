"""Whether an encoded image decodes: a fast check of its markers, and the decoder itself.

The markers accept all files but damaged ones and a few rare formats. Only an image that they reject
has to be decoded. PIL rewrites the few kinds that DALI does not decode.
"""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.loading.formats import Decoding

Bytes = NDArray[np.uint8]

# The formats that are read, by PIL's names. PIL opens more of them.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")


def looks_whole(encoded: Bytes) -> bool:
    """Whether this begins and ends like a JPEG or a PNG (uint8 `[length]`)."""
    start, end = encoded[:8].tobytes(), encoded[-12:].tobytes()
    if start[:3] == b"\xff\xd8\xff":
        return end[-2:] == b"\xff\xd9"
    return start == b"\x89PNG\r\n\x1a\n" and end[4:8] == b"IEND"


# The first bytes of formats that PIL decodes: JPEG 2000, since DALI's decoder on the CPU ends the
# process at many damaged files, and bitmaps and PPM as text.
FOR_PIL = (b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"P1", b"P2", b"P3", b"P4")
# The first bytes of formats that have no end marker.
STARTS = (b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P5", b"P6", *FOR_PIL)
WEBP_HAS_EXIF = 8  # a flag in the extended header


def worth_trying(encoded: Bytes) -> bool:
    """Whether the training pipeline may get it: its markers are right, or its format has none."""
    return looks_whole(encoded) or encoded[:8].tobytes().startswith(STARTS)


def too_large(encoded: Bytes, max_pixels: int) -> str | None:
    """The reason, in a few words, if an image's header says that it has more pixels."""
    found = pixels(encoded)
    return f"{found:,} pixels, more than data.max_pixels" if found > max_pixels else None


def pixels(encoded: Bytes) -> int:
    """Width times height as the header says; 0 if it does not say."""
    head = encoded[:32].tobytes()
    if head[:2] == b"\xff\xd8":
        return _pixels_of_jpeg(encoded.data)
    if head[:4] == b"\x89PNG" and len(head) > 23:
        return int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big")
    if head.startswith(STARTS):
        return _pixels_by_pil(encoded)
    return 0


def _pixels_by_pil(encoded: Bytes) -> int:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            return image.width * image.height
    except Image.DecompressionBombError as error:  # its text has the number
        found = re.search(r"\((\d+) pixels", str(error))
        return int(found[1]) if found else sys.maxsize
    except Exception:  # damaged in any way: the decoder says how
        return 0


def _pixels_of_jpeg(content: memoryview) -> int:
    """From the first frame header, which stands behind segments of known lengths."""
    at, end = 2, len(content) - 9
    while at <= end and content[at] == 0xFF:
        marker = content[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = content[at + 5] << 8 | content[at + 6]
            return height * (content[at + 7] << 8 | content[at + 8])
        if marker in (0xD9, 0xDA):
            return 0
        if marker == 0xFF:  # fill bytes before a marker
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
        else:
            at += 2 + (content[at + 2] << 8 | content[at + 3])
    return 0


def is_for_pil(encoded: Bytes) -> bool:
    """Whether PIL decodes these bytes: `FOR_PIL`, and lossless WebP with EXIF data."""
    head = encoded[:21].tobytes()
    if head.startswith(b"RIFF") and head[12:16] == b"VP8X" and head[20] & WEBP_HAS_EXIF:
        return b"VP8L" in encoded[:4096].tobytes()  # behind a colour profile, if there is one
    return head.startswith(FOR_PIL)


class Decoder:
    """Decodes single images as the training pipeline does. Not for several threads at once."""

    def __init__(self, device_id: int | None = None, decoding: Decoding | None = None) -> None:
        self._how = device_id, decoding or Decoding()
        self._pipe: Any = None

    def usable(self, encoded: Bytes) -> Bytes | str:
        """The image for DALI, as it is or rewritten by PIL; or why it is bad, in a few words."""
        if not len(encoded):
            return "empty"
        if is_for_pil(encoded):
            return rewritten(encoded)
        error = self._error(encoded)
        if error is None:
            return encoded
        if encoded[:8].tobytes().startswith(STARTS):
            return rewritten(encoded)
        return why(encoded) or dali_message(error)

    def problem(self, encoded: Bytes) -> str | None:
        """Why the image cannot be used, in a few words; None if it can."""
        found = self.usable(encoded)
        return found if isinstance(found, str) else None

    def _error(self, encoded: Bytes) -> RuntimeError | None:
        from ddp_ssl.data.loading import dali

        if self._pipe is None:
            self._pipe = dali.decoder(*self._how)
        try:
            self._pipe.feed_input("encoded", [encoded])
            self._pipe.run()
        except RuntimeError as error:
            self._pipe = None  # after an error it cannot go on
            return error
        return None


def rewritten(encoded: Bytes) -> Bytes | str:
    """An image as PIL decodes it, in RGB and as a PNG; or why it does not, in a few words."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            if image.format not in FORMATS:
                return f"{image.format} is not supported"
            whole: Image.Image = image
            if image.mode.startswith("I"):  # 16 bits: the upper eight
                whole = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            whole.convert("RGB").save(buffer, "PNG", compress_level=1)
    except Exception as error:
        return _reason(error)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def why(encoded: Bytes) -> str | None:
    """PIL's reason why an image does not decode, in a few words; None if PIL decodes it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            if image.format not in FORMATS:
                return f"{image.format} is not supported"
            image.load()
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return "not an image" if "cannot identify" in str(error) else first_line(error)


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def dali_message(error: BaseException) -> str:
    """The one line of DALI's message that names the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "rror" in line or "fail" in line] or lines
    return f"DALI stopped: {named[-1] if named else type(error).__name__}"
