"""What a part of the campaign gives: how often something was tried, and what came of it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the campaign's table.

    Attributes:
        part: ``inputs``, ``faults`` or ``soak``.
        what: One short name, e.g. ``pictures`` or ``SIGKILL in training``.
        tried: How many cases.
        right: Those that gave a right answer.
        refused: Those that were refused properly: one line, exit 2.
        failures: A line for each of the others, and how to replay it.
        slowest_s: Seconds of the longest case; ``within_s`` is its bound.
        peak_mb: Most resident memory of a case, the process included; ``within_mb`` is its bound.
    """

    part: str
    what: str
    tried: int
    right: int
    refused: int = 0
    failures: tuple[str, ...] = ()
    slowest_s: float | None = None
    within_s: float | None = None
    peak_mb: float | None = None
    within_mb: float | None = None
