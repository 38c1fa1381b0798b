"""Where the values of a parquet column lie in the file, so that one is read without the others.

A column is stored in pages of about a megabyte, which are compressed one by one. `Place` says where
a value is: in an uncompressed page its bytes themselves; in a page of snappy's, the usual case, the
part of the stream that makes the value; with another codec the whole page. Images are compressed
already, so snappy keeps nearly all of their bytes as they are, and a part is as long as the image.
numpy and the standard library only; pyarrow has the codecs.
"""

from __future__ import annotations

import errno
import functools
import importlib
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.errors import refused

CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "BROTLI", "ZSTD", "LZ4")
SNAPPY = 1
PLAIN, DICTIONARY = (0,), (2, 8)  # encodings
ENCODINGS = {
    5: "DELTA_BINARY_PACKED", 6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY",
    9: "BYTE_STREAM_SPLIT",
}  # fmt: skip
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
HEADS = 512, 1 << 16, 1 << 24  # bytes in which a page's header is looked for
WORTH = 0.9  # a page of snappy's that is smaller than this part of its content is read whole
NO_COPY = 1 << 62


class UnsupportedError(Exception):
    """A column is written in a way that is not read here; a few words."""


class Place(NamedTuple):
    """Where a value is: `size` bytes that `part` of the file holds or makes.

    `part` is the codec, the bytes stored at `offset`, then for compressed ones: what is left of the
    literal they begin in (0: they begin with a tag), the bytes made before the value, and the bytes
    made after it. A negative number after it means that they are made; a positive one that they are
    zeros to be added, because the value ends inside a literal.
    """

    offset: int
    size: int
    part: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)


def made_of(stored: NDArray[np.uint8], size: int, part: tuple[int, ...]) -> NDArray[np.uint8]:
    """The value, uint8 `[size]`, from the bytes that its `Place` names; raises `OSError`."""
    codec, _, head, before, after = part
    total = before + size + abs(after)
    content: Any = stored
    if codec == SNAPPY:
        begin = _varint(total) + (_literal(head) if head else b"")
        content = b"".join((begin, stored.data, bytes(max(after, 0))))
    try:
        made = _decompress(codec, content, total)
    except ValueError as error:
        raise OSError(errno.EIO, str(error)) from None
    return np.frombuffer(made, np.uint8, size, before)


@functools.cache
def arrow(module: str = "pyarrow") -> Any:
    """pyarrow; raises `ValueError`, one line, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            "data.root: parquet files are read with pyarrow, which is not installed: "
            "pip install 'ddp_ssl[parquet]', or pip install pyarrow"
        ) from None


def _decompress(codec: int, content: Any, total: int) -> Any:
    name = "lz4_raw" if CODECS[codec] == "LZ4" else CODECS[codec].lower()
    with refused("cannot be decompressed"):
        made = arrow().Codec(name).decompress(content, decompressed_size=total)
    if len(made) != total:
        raise ValueError(f"decompressed to {len(made)} instead of {total} bytes")
    return made


# --- snappy: literals, which are bytes as they are, and copies of earlier bytes ------------------


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _literal(length: int) -> bytes:
    """The tag of a literal."""
    if length <= 60:
        return bytes([(length - 1) << 2])
    more = (length - 1).to_bytes(4, "little").rstrip(b"\0") or b"\0"
    return bytes([(59 + len(more)) << 2]) + more


class Elements:
    """The elements of a snappy stream, and which part of it makes some bytes."""

    def __init__(self, stream: bytes) -> None:
        """Raises `ValueError` or `IndexError` for what is no such stream."""
        self.starts: list[int] = []  # of what each element makes
        self.tags: list[int] = []  # where its tag begins, and where the last one ends
        self.bodies: list[int] = []  # where a literal's bytes begin; -1 for a copy
        self.sources: list[int] = []  # where the bytes that it copies begin
        at = 0
        while stream[at] > 127:
            at += 1
        at, made, end = at + 1, 0, len(stream)
        while at < end:
            tag = stream[at]
            self.starts.append(made)
            self.tags.append(at)
            kind = tag & 3
            if kind == 0:
                length, more = (tag >> 2) + 1, max((tag >> 2) - 59, 0)
                if more:
                    length = int.from_bytes(stream[at + 1 : at + 1 + more], "little") + 1
                self.bodies.append(at + 1 + more)
                self.sources.append(NO_COPY)
                at += 1 + more + length
            else:
                if kind == 1:
                    length, back = (tag >> 2 & 7) + 4, (tag >> 5) << 8 | stream[at + 1]
                else:
                    length = (tag >> 2) + 1
                    back = int.from_bytes(stream[at + 1 : at + 1 + 2 * kind - 2], "little")
                self.bodies.append(-1)
                self.sources.append(made - back)
                at += (2, 3, 5)[kind - 1]
            made += length
        self.starts.append(made)
        self.tags.append(at)

    def part(self, first: int, end: int) -> tuple[int, tuple[int, int, int, int, int]]:
        """The place in the stream, and a `Place`'s part, that make bytes `first` to `end`."""
        starts, bodies = self.starts, self.bodies
        last = bisect_left(starts, end) - 1  # the element with the last byte
        start = first
        while True:
            i = bisect_right(starts, start) - 1
            if bodies[i] < 0:
                start = starts[i]  # a copy is not cut
            earliest = min(self.sources[i : last + 1])
            if earliest >= start:
                break
            start = earliest
        head = starts[i + 1] - start if start > starts[i] else 0
        begin = bodies[i] + start - starts[i] if head else self.tags[i]
        after = starts[last + 1] - end
        if bodies[last] < 0:
            stop, after = self.tags[last + 1], -after
        else:
            stop = bodies[last] + end - starts[last]
            if head and i == last:  # all in one literal: its new tag is of the right length
                head, after = head - after, 0
        return begin, (SNAPPY, stop - begin, head, first - start, after)


# --- pages ---------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A page with values, or a data page whose cells are `coded`: numbers of the dictionary's."""

    cells: int  # empty ones too; 0 for the dictionary's page
    coded: bool
    offset: int  # of what is compressed
    codec: int
    stored: bytes
    content: bytes
    spans: list[tuple[int, int]]  # of each value in `content`

    def places(self) -> Iterator[tuple[memoryview, Place]]:
        """Each value and its place, in order."""
        content, elements = memoryview(self.content), None
        if self.codec == SNAPPY and len(self.stored) > WORTH * len(content):
            elements = Elements(self.stored)
        for first, end in self.spans:
            size = end - first
            if not self.codec:
                place = Place(self.offset + first, size)
            elif elements is not None and size:
                begin, part = elements.part(first, end)
                place = Place(self.offset + begin, size, part)
            else:
                after = end - len(content)
                begin = 0
                if self.codec == SNAPPY:  # its length is written anew
                    begin = len(_varint(len(content)))
                whole = (self.codec, len(self.stored) - begin, 0, first, after)
                place = Place(self.offset + begin, size, whole)
            yield content[first:end], place


def pages(file: BinaryIO, chunk: Any, max_definition: int) -> Iterator[Page]:
    """The pages of a column chunk (pyarrow's `ColumnChunkMetaData`), the dictionary's first.

    Raises `UnsupportedError`, `ValueError` for a damaged page, and the file system's `OSError`.
    """
    if chunk.compression not in CODECS:
        raise UnsupportedError(f"the codec {chunk.compression}")
    codec = CODECS.index(chunk.compression)
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and (chunk.dictionary_page_offset or 0) > 0:  # some write 0
        at = min(at, chunk.dictionary_page_offset)
    end, cells = at + chunk.total_compressed_size, chunk.num_values
    while cells > 0 and at < end:
        header, at = _header(file, at)
        stored = _read(file, at, header[3])
        page = _page(header, stored, at, codec, max_definition)
        at += len(stored)
        if page is not None:
            cells -= page.cells
            yield page


def _page(
    header: dict[int, Any], stored: bytes, offset: int, codec: int, max_definition: int
) -> Page | None:
    kind, total = header[1], header[2]
    if kind == DICTIONARY_PAGE:
        cells, levels, encoding = 0, 0, PLAIN[0]  # "plain dictionary" means its data pages
    elif kind == DATA_PAGE:
        cells, encoding, levels = header[5][1], header[5][2], -1
    elif kind == DATA_PAGE_V2:
        about = header[8]
        cells, encoding, levels = about[1], about[4], about[5] + about[6]
        codec = codec if about.get(7, True) else 0
        offset, stored, total = offset + levels, stored[levels:], total - levels
        levels = 0
    else:
        return None
    if encoding not in PLAIN + DICTIONARY:
        raise UnsupportedError(f"the encoding {ENCODINGS.get(encoding, encoding)}")
    if encoding in DICTIONARY:
        return Page(cells, True, offset, codec, b"", b"", [])
    content = stored
    if codec:  # also what is compressed of nothing, as where all cells are empty
        content = bytes(_decompress(codec, stored, total)) if total else b""
    if levels < 0:  # which cells are empty; pyarrow says so too
        levels = 4 + struct.unpack_from("<I", content)[0] if max_definition else 0
    spans = []
    at = levels
    while at < len(content):
        (length,) = struct.unpack_from("<I", content, at)
        at += 4
        if at + length > len(content):
            raise ValueError("a value ends after its page")
        spans.append((at, at + length))
        at += length
    return Page(cells, False, offset, codec, stored, content, spans)


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    content = file.read(count)
    if len(content) != count:
        raise ValueError(f"it ends before byte {at + count}")
    return content


def _header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """A page's header by field number, and the offset of its end."""
    for most in HEADS:
        file.seek(at)
        head = file.read(most)
        try:
            header, end = _struct(head, 0)
            return header, at + end
        except IndexError:
            if len(head) < most:
                break
    raise ValueError(f"no page begins at byte {at}")


# Thrift's compact protocol, of which parquet's headers use structs, whole numbers, bytes, booleans.


def _struct(buffer: bytes, at: int) -> tuple[dict[int, Any], int]:
    found: dict[int, Any] = {}
    field = 0
    while (byte := buffer[at]) != 0:
        at += 1
        if byte >> 4:
            field += byte >> 4
        else:
            field, at = _whole(buffer, at)
        found[field], at = _value(buffer, at, byte & 15)
    return found, at + 1


def _value(buffer: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind in (4, 5, 6):
        return _whole(buffer, at)
    if kind == 3:
        return buffer[at], at + 1
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _unsigned(buffer, at)
        if at + length > len(buffer):
            raise IndexError
        return buffer[at : at + length], at + length
    if kind == 12:
        return _struct(buffer, at)
    raise ValueError(f"a field of kind {kind} in a page's header")


def _unsigned(buffer: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _whole(buffer: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(buffer, at)
    return value >> 1 ^ -(value & 1), at
