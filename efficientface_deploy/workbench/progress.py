"""Tell how long work goes on: a live line on a terminal, a plain one now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_LOG_SECONDS = 30.0


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


class Rate:
    """How many are done, how fast, and how long the rest takes; told on standard error.

    Args:
        what: They are, e.g. ``pictures``.
        total: In all.
        done: Before the start.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._before = what, total, done
        self._start = time.monotonic()
        self._live = sys.stderr.isatty()
        self._told = self._start

    def tell(self, done: int) -> None:
        """Say how far it is: a live line on a terminal, one a half-minute and the last in a log."""
        now = time.monotonic()
        if not self._live and now - self._told < _LOG_SECONDS and done < self._total:
            return
        self._told = now
        rate = (done - self._before) / max(now - self._start, 1e-9)
        text = f"{done:,} of {self._total:,} {self._what}, {rate:,.0f} a second"
        if rate > 0 and done < self._total:
            text += f", {duration((self._total - done) / rate)} left"
        last = done >= self._total
        start, end = ("\r\x1b[K", "\n" if last else "") if self._live else ("", "\n")
        print(start + text, end=end, file=sys.stderr, flush=True)
