"""Text for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(text: object) -> str:
    """The text without line breaks."""
    return " ".join(str(text).split())


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the closest of the known words, or nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), 1, 0.4)
    return f"; did you mean {close[0]}?" if close else ""
