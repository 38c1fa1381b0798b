"""Checksums of files that are read back."""

from __future__ import annotations

import hashlib
import json
import zlib
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 8 << 20
CHECKSUM = "checksum"


def sha256_of(file: BinaryIO | FileIO) -> str:
    """SHA-256 of the rest of an open file; may raise `OSError`."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_at(path: Path) -> str:
    """SHA-256 of a file; may raise `OSError`."""
    with path.open("rb", buffering=0) as file:
        return sha256_of(file)


def checksum(path: Path) -> int:
    """CRC-32 of a file, which shows damage and no forgery; may raise `OSError`."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def sealed(content: dict[str, Any]) -> str:
    """The content as JSON with a checksum of itself."""
    return json.dumps({**content, CHECKSUM: _of(content)}, indent=1) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """The content of what `sealed` wrote; raises `ValueError` if it is something else."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop(CHECKSUM, None) != _of(content):
        raise ValueError("its checksum differs")
    return content


def _of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
