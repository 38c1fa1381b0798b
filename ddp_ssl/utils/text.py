"""Text for messages."""

import difflib
from collections.abc import Iterable, Sequence

from ddp_ssl.errors import cut


def one_line(text: object, limit: int | None = None) -> str:
    """The text without line breaks; beyond `limit` characters its middle is left out."""
    line = " ".join(str(text).split())
    return line if limit is None else cut(line, limit)


def summary(docstring: str | None) -> str:
    """The first line of a docstring."""
    return (docstring or "").partition("\n")[0]


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 step`, `2 steps`; `plural` where it is not the noun and an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def suggest(word: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """`; did you mean X?` with the closest of the known words, or nothing if none is close.

    Capital letters count as small ones.
    """
    of = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), of, 1, cutoff)
    return f"; did you mean {of[close[0]]}?" if close else ""


def markdown_lines(rows: Sequence[Sequence[str]], align: str = "-") -> list[str]:
    """An aligned Markdown table; the first row is the heading.

    `align`: `<`, `>` or `-` (Markdown's default) of each column; the last counts for the rest.
    """
    cells = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    marks = align.ljust(len(widths), align[-1])
    lines = []
    for row in cells:
        columns = zip(row, widths, marks, strict=True)
        padded = (t.rjust(w) if mark == ">" else t.ljust(w) for t, w, mark in columns)
        lines.append(f"| {' | '.join(padded)} |")
    rules = {"<": ":{}-", ">": "-{}:", "-": "-{}-"}
    rule = (rules[mark].format("-" * w) for w, mark in zip(widths, marks, strict=True))
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]
