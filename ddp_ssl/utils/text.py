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


def markdown_table(rows: list[tuple[str, str]]) -> str:
    """Rows of name and value as an aligned Markdown table, without a heading."""
    rows = [(name.replace("|", "\\|"), value.replace("|", "\\|")) for name, value in rows]
    left = max((len(name) for name, _ in rows), default=3)
    right = max((len(value) for _, value in rows), default=3)
    lines = [f"| {'':<{left}} | {'':<{right}} |", f"|{'-' * (left + 2)}|{'-' * (right + 2)}|"]
    lines += [f"| {name:<{left}} | {value:<{right}} |" for name, value in rows]
    return "\n".join(lines)
