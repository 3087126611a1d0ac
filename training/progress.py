"""Tell how long work goes on: a live line on a terminal, a plain one now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn
from rich.progress import track as rich_track

LOG_SECONDS = 30.0

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, with a bar while they last; a log shows nothing."""
    hidden = not sys.stdout.isatty()
    yield from rich_track(items, what, total=total, transient=True, disable=hidden)


class TrainingProgress:
    """Shows one epoch's step, loss and speed, and the time left for all epochs.

    Args:
        epoch: The epoch, from 0.
        epochs: Epochs of the whole training.
        steps: Steps of one epoch.
        batch_size: Images of one step.
        first: Steps that a run which goes on has done before.
        rank: Of this process; only 0 tells.
    """

    def __init__(
        self, epoch: int, epochs: int, steps: int, batch_size: int, first: int = 0, rank: int = 0
    ) -> None:
        self.epoch = epoch
        self.epochs = epochs
        self.steps = steps
        self.batch_size = batch_size
        self.first = first
        self._silent = rank > 0
        self._bar = Progress(
            BarColumn(10),
            TextColumn("{task.description}"),
            transient=True,
            disable=self._silent or not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(f"epoch {epoch + 1}/{epochs}", total=steps)
        self._started = self._told = time.perf_counter()

    def update(self, step: int, loss: float) -> None:
        """Tell that ``step`` steps are done, with the mean loss so far."""
        now = time.perf_counter()
        line = self._describe(step, loss, now - self._started)
        self._bar.update(self._task, completed=step, description=line)
        if self._silent:
            return
        if self._bar.disable and now - self._told >= LOG_SECONDS:
            self._told = now
            print(line, flush=True)

    def _describe(self, step: int, loss: float, seconds: float) -> str:
        done = step - self.first
        steps_left = (self.epochs - self.epoch) * self.steps - step
        return (
            f"epoch {self.epoch + 1}/{self.epochs}, step {step}/{self.steps}: loss {loss:.4f}, "
            f"{done * self.batch_size / seconds:.0f} images/s, "
            f"{duration(steps_left * seconds / done)} left"
        )

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
