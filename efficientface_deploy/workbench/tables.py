"""Tables, as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is text and whose other columns are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(escaped(str(cell)) for cell in line) + " |" for line in lines
    )


def escaped(text: str) -> str:
    """Text in which Markdown finds no table cell, emphasis, link or tag."""
    for char in "\\`*_[]<>|":
        text = text.replace(char, "\\" + char)
    return text
