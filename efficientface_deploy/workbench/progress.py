"""Tell how long work goes on: a live line on a terminal, a plain one now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, with a bar while they last; a log shows nothing."""
    if not sys.stdout.isatty():
        yield from items
        return
    from rich.progress import track as rich_track  # here: an export needs no rich

    yield from rich_track(items, what, total=total, transient=True)


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
