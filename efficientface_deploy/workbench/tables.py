"""Tables, described once; as Markdown and, by rich, on a terminal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Row = Sequence[object]

_UNESCAPED_BAR = re.compile(r"(?<!\\)\|")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose cells are Markdown, shown by ``str``.

    Attributes:
        columns: Names; one that starts with ``>`` holds numbers, which are set to the right.
        rows: A cell for each column; a row of one cell is a heading over those that follow.
        title: Above it, where it is not empty.
        notes: Below it, a sentence each.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    notes: Sequence[str] = ()

    def to_markdown(self) -> str:
        """The table in Markdown, which ends with a line break."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines.append(_line(name.removeprefix(">") for name in self.columns))
        lines.append("|" + "|".join("--:" if _is_number(n) else "---" for n in self.columns) + "|")
        for row in self.rows:
            empty = [""] * (len(self.columns) - 1)
            lines.append(_line([f"**{row[0]}**", *empty] if self._is_heading(row) else row))
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def __rich__(self) -> RichTable:
        """The table as rich prints it."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        drawn = RichTable(title=escape(self.title), caption=escape("\n".join(self.notes)) or None)
        for name in self.columns:
            drawn.add_column(
                name.removeprefix(">"),
                justify="right" if _is_number(name) else "left",
                overflow="fold",
            )
        for row in self.rows:
            cells = [escape(str(cell)) for cell in row]
            if self._is_heading(row):
                drawn.add_section()
                cells = [f"[bold]{cells[0]}[/bold]"]
            drawn.add_row(*cells)
        return drawn

    def _is_heading(self, row: Row) -> bool:
        return len(row) == 1 < len(self.columns)


def escaped(text: str) -> str:
    """Text in which Markdown finds no table cell, emphasis, link or tag."""
    for char in "\\`*_[]<>|":
        text = text.replace(char, "\\" + char)
    return text


def _is_number(column: str) -> bool:
    return column.startswith(">")


def _line(cells: Iterable[object]) -> str:
    """A row of cells; what is escaped in them already stays so."""
    return "| " + " | ".join(_UNESCAPED_BAR.sub(r"\|", str(cell)) for cell in cells) + " |"
