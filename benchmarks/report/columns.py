"""How a table is made of rows: a column is a name and what it says of a row.

The name of one that holds figures starts with ``>``. What a row does not have is left empty, and a
column that no row fills is left out: an older result measured less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report.result import Row
from efficientface_deploy.workbench.tables import Table

Columns = Mapping[str, Callable[[Any], str]]


class Heading(str):
    """A line over the rows that follow it."""


def tabulate(title: str, columns: Columns, rows: Iterable[Any], notes: Sequence[str] = ()) -> Table:
    """A table without the columns that no row fills.

    Args:
        title: Above it.
        columns: Name of each column -> what it says of a row.
        rows: Parts of a result, and headings.
        notes: Below it.
    """
    cells = [
        [row] if isinstance(row, Heading) else [say(row) for say in columns.values()]
        for row in rows
    ]
    filled = [row for row in cells if len(row) == len(columns)]
    kept = [index for index in range(len(columns)) if any(row[index] for row in filled)]
    names = [name for index, name in enumerate(columns) if index in kept]
    shown = [[row[index] for index in kept] if len(row) == len(columns) else row for row in cells]
    return Table(names, shown, title, notes)


def of(key: str, write: Callable[[Any], str] | None = None) -> Callable[[Any], str]:
    """What a column says of a row: the value at ``key``, or nothing where there is none."""
    write = write or _text
    return lambda row: "" if row.get(key) is None else write(row[key])


def scaled(factor: float, places: int) -> Callable[[float], str]:
    """Writes a figure times ``factor``, with so many decimals."""
    return lambda value: f"{factor * value:.{places}f}"


def interval(ratio: Mapping[str, float], places: int = 2) -> str:
    """``2.00 (1.90 to 2.10)``; a figure without ends stands alone."""
    figure, *ends = (f"{ratio[k]:.{places}f}" for k in ("value", "low", "high") if k in ratio)
    return f"{figure} ({ends[0]} to {ends[1]})" if ends else figure


def share(key: str) -> Callable[[Row], str]:
    """A share in percent, with its interval where the row has one."""

    def say(row: Row) -> str:
        ends = row.get(f"{key}_interval")
        text = "" if row.get(key) is None else f"{100 * row[key]:.2f}"
        return f"{text} ({100 * ends[0]:.2f} to {100 * ends[1]:.2f})" if text and ends else text

    return say


def points(difference: Mapping[str, Any]) -> str:
    """A difference of shares in percentage points, with its interval."""
    value, (low, high) = difference["value"], difference["interval"]
    return f"{100 * value:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def _text(value: Any) -> str:
    """A single value; an object is a figure with its interval."""
    if value is None:
        return ""
    if isinstance(value, dict):
        ends = f" ({_text(value['low'])} to {_text(value['high'])})" if "low" in value else ""
        return _text(value["value"]) + ends
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
