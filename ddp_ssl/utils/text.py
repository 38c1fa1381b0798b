"""Text for people."""

from __future__ import annotations


def one_line(text: object) -> str:
    """The text without line breaks."""
    return " ".join(str(text).split())


def markdown_table(rows: list[tuple[str, str]]) -> str:
    """Rows of name and value as an aligned Markdown table, without a heading."""
    rows = [(name.replace("|", "\\|"), value.replace("|", "\\|")) for name, value in rows]
    left = max((len(name) for name, _ in rows), default=3)
    right = max((len(value) for _, value in rows), default=3)
    lines = [f"| {'':<{left}} | {'':<{right}} |", f"|{'-' * (left + 2)}|{'-' * (right + 2)}|"]
    lines += [f"| {name:<{left}} | {value:<{right}} |" for name, value in rows]
    return "\n".join(lines)
