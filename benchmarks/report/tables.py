"""How a table is made of a result: a form names its rows and, for each column, what it says of one.

The name of a column of figures starts with ``>``. What a row does not have is left empty, and a
column that no row fills is left out: an older result measured less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.report.result import Result, Row
from efficientface_deploy.errors import printable
from efficientface_deploy.workbench.tables import Table

Columns = Mapping[str, Callable[[Row], str]]

NOISY = "something else ran, or a median is uncertain by over 10 %: read the times with care"


class TableForm(NamedTuple):
    """What a table is made of.

    Attributes:
        title: Above it, with ``{keys}`` of the result.
        rows: The rows of a result.
        columns: Name -> what it says of a row; a function where the names depend on the rows.
        notes: What a name means, with ``{keys}`` of the result; not that of a column left out.
        group: The heading that a row stands under.
    """

    title: str
    rows: Callable[[Result], Sequence[Row]]
    columns: Columns | Callable[[Sequence[Row]], Columns]
    notes: Mapping[str, str] = {}
    group: Callable[[Row], str] | None = None

    def fill(self, result: Result) -> Table:
        """The table of a result."""
        rows = self.rows(result)
        columns = self.columns(rows) if callable(self.columns) else self.columns
        table = tabulate(self.title.format_map(result), columns, rows, group=self.group)
        notes = [
            printable(f"{name.removeprefix('>')}: {note.format_map(result)}")
            for name, note in self.notes.items()
            if name in table.columns or name not in columns
        ]
        if any(_is_busy(part) for row in rows for part in (row, *row.values())):
            notes.append(NOISY)
        return dataclasses.replace(table, notes=notes)


def tabulate(
    title: str,
    columns: Columns,
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    group: Callable[[Row], str] | None = None,
) -> Table:
    """A table without the columns that no row fills; see :class:`TableForm`."""
    cells = {name: [printable(say(row)) for row in rows] for name, say in columns.items()}
    filled = {name: column for name, column in cells.items() if any(column)}
    lines: list[list[str]] = []
    heading = None
    for index, row in enumerate(rows):
        if group is not None and group(row) != heading:
            heading = group(row)
            lines.append([printable(heading)])
        lines.append([column[index] for column in filled.values()])
    return Table([printable(name) for name in filled], lines, printable(title), notes)


def every_key(write: Callable[[Any], str] | None = None) -> Callable[[Sequence[Row]], Columns]:
    """A column for each key of the rows but lists; ``write`` is for what is no text."""

    def columns(rows: Sequence[Row]) -> Columns:
        found: dict[str, Callable[[Row], str]] = {}
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(key) for row in rows]
            if any(isinstance(value, (str, bool)) for value in values):
                found[key] = of(key)
            elif not any(isinstance(value, list) for value in values):
                found[f">{key}"] = of(key, write)
        return found

    return columns


# ---- what a column says of a row


def of(key: str, write: Callable[[Any], str] | None = None) -> Callable[[Row], str]:
    """The value at ``key``, or nothing where there is none."""
    write = write or _text
    return lambda row: "" if row.get(key) is None else write(row[key])


def times(*names: str) -> Columns:
    """Columns of milliseconds that no row may lack, e.g. ``p50`` of ``p50_ms``."""

    def say(name: str) -> Callable[[Row], str]:
        return lambda row: digits(row[f"{name}_ms"])

    return {f">{name.replace('_', ' ')}": say(name) for name in names}


def share(key: str) -> Callable[[Row], str]:
    """A share in percent, with its interval where the row has one."""

    def say(row: Row) -> str:
        ends = row.get(f"{key}_interval")
        text = "" if row.get(key) is None else f"{100 * row[key]:.2f}"
        return f"{text} ({100 * ends[0]:.2f} to {100 * ends[1]:.2f})" if text and ends else text

    return say


# ---- how a value is written


def digits(value: float) -> str:
    """Three digits, and no exponent: 0.0123, 1.20, 1234.

    Raises:
        ValueError: It is negative, as no time and no rate is.
    """
    if value < 0:
        raise ValueError(f"{value} is less than 0")
    return f"{value:#.3g}".removesuffix(".") if value < 999.5 else f"{value:.0f}"


def scaled(factor: float, places: int) -> Callable[[float], str]:
    """Writes a figure times ``factor``, with so many decimals."""
    return lambda value: f"{factor * value:.{places}f}"


def interval(ratio: Mapping[str, float], places: int = 2) -> str:
    """``2.00 (1.90 to 2.10)``; a figure without ends stands alone."""
    figure, *ends = (f"{ratio[k]:.{places}f}" for k in ("value", "low", "high") if k in ratio)
    return f"{figure} ({ends[0]} to {ends[1]})" if ends else figure


def ratio_interval(value: Mapping[str, float]) -> str:
    """``1.105 (0.982 to 1.178)``: an interval of a ratio near 1."""
    return interval(value, 3)


def points(difference: Mapping[str, Any]) -> str:
    """A difference of shares in percentage points, with its interval."""
    value, (low, high) = difference["value"], difference["interval"]
    return f"{100 * value:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def count(number: int, thing: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _text(value: Any) -> str:
    """A single value; of an object its figure, with an interval, or the median of its calls."""
    if isinstance(value, dict):
        return _text(value["p50_ms"]) if "p50_ms" in value else interval(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def _is_busy(part: Any) -> bool:
    return isinstance(part, dict) and bool(part.get("busy"))
