"""Overlap reading and preparing of frames with what is done to them, in bounded memory.

Two threads of ours and the caller's own: one takes frames from their source, one prepares them,
and the caller gets them in order.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

from efficientface_deploy.errors import ConfigError

POLICIES = ("every", "newest")

# A source that gives no frame for so long (an unplugged camera) may outlive its stream.
JOIN_SECONDS = 5.0

Item = TypeVar("Item")
Made = TypeVar("Made")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Arrival(Generic[Item]):
    """Something that came from a source.

    Attributes:
        index: How many came before it, those that were dropped included.
        time: When it came, by ``time.monotonic``, seconds.
        item: What came, or what was made of it.
    """

    index: int
    time: float
    item: Item


def check_policy(policy: str, queue_size: int) -> None:
    """Refuse what :func:`overlap` does not know.

    Raises:
        ConfigError: Another policy, or a queue that holds nothing.
    """
    if policy not in POLICIES:
        fix = "choose every for files and newest for cameras"
        raise ConfigError("policy", " or ".join(POLICIES), repr(policy), fix)
    if queue_size < 1:
        raise ConfigError("queue_size", "at least 1", str(queue_size), "leave it out")


def overlap(
    frames: Iterable[Item], prepare: Callable[[Item], Made], policy: str, queue_size: int
) -> Generator[Arrival[Made], None, None]:
    """Prepare frames in the background, in order.

    Args:
        frames: Read in a thread of its own, so that a camera is never kept waiting.
        prepare: Called in another thread.
        policy: ``every`` prepares each frame and lets the source wait while a queue is full;
            ``newest`` drops what is older than the newest that is waiting.
        queue_size: Frames that may wait before and after ``prepare``; ``newest`` takes one.

    Yields:
        What was prepared. An error of the source or of ``prepare`` is raised here, after what came
        before it. However the generator ends, its threads end with it.
    """
    newest = policy == "newest"
    size = 1 if newest else queue_size
    waiting: _Handoff[Arrival[Item]] = _Handoff(size, newest)
    ready: _Handoff[Arrival[Made]] = _Handoff(size, newest)

    def arrive(numbered: tuple[int, Item]) -> Arrival[Item]:
        return Arrival(numbered[0], time.monotonic(), numbered[1])

    def prepared(arrival: Arrival[Item]) -> Arrival[Made]:
        return Arrival(arrival.index, arrival.time, prepare(arrival.item))

    threads = [
        threading.Thread(target=_move, args=arguments, name=f"efficientface-{name}", daemon=True)
        for name, arguments in {
            "read": (enumerate(frames), arrive, waiting),
            "prepare": (waiting, prepared, ready),
        }.items()
    ]
    try:
        for thread in threads:
            thread.start()
        yield from ready
    finally:
        waiting.close()
        ready.close()
        for thread in threads:
            if thread.ident is not None:  # an interrupt may come before the start
                thread.join(JOIN_SECONDS)
            if thread.is_alive():
                _log.warning("%s is still waiting for its source", thread.name)


def _move(items: Iterable[Any], work: Callable[[Any], Any], to: _Handoff[Any]) -> None:
    """Body of a thread: hand on what is made of each item, and in the end how it ended."""
    try:
        for item in items:
            if not to.put(work(item)):
                return
    except BaseException as error:  # noqa: BLE001 - it belongs to whoever takes the items
        to.end(error)
    else:
        to.end(None)


class _Handoff(Generic[Item]):
    """A bounded queue from one thread to another, which either of them can end.

    Args:
        size: Items that may wait.
        newest: True to drop the oldest rather than to wait when it is full.
    """

    def __init__(self, size: int, newest: bool) -> None:
        self._items: deque[Item] = deque()
        self._size = size
        self._newest = newest
        self._changed = threading.Condition()
        self._closed = False  # nobody takes any more
        self._ended = False  # nothing more comes
        self._error: BaseException | None = None

    def put(self, item: Item) -> bool:
        """Hand an item over; False when nobody takes it any more."""
        with self._changed:
            if self._newest and len(self._items) == self._size:
                self._items.popleft()
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None) -> None:
        """Say that nothing more comes, and why."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Say that nobody takes any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended or self._closed)
                if not self._items:
                    break
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
            del item  # a frame is large, and the next may be long in coming
        if self._error is not None and not self._closed:
            raise self._error
