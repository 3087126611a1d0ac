"""How far an engine's build is, on one line of a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from .engine import Progress

_ERASE = "\r\x1b[K"


@contextlib.contextmanager
def build_progress(what: str) -> Iterator[Progress | None]:
    """Show a build on standard error while it lasts, if somebody watches.

    Args:
        what: What is built, for people.

    Yields:
        What :func:`engine.build_engine` takes as ``progress``; None where nobody watches.
    """
    if not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda phase, share: _write(f"{_ERASE}{what}: {share:.0%}, {phase.lower()}")
    finally:
        _write(_ERASE)


def _write(text: str) -> None:
    """Write what may be lost: a terminal that went away must not end a build."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
