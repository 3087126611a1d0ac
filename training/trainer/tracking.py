"""What a training leaves to look at: metrics.csv, curves.png, TensorBoard's events; and a bar."""

from __future__ import annotations

import csv
import io
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from efficientface_deploy.files import write_text
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.progress import duration
from efficientface_deploy.workbench.requirements import is_installed

METRICS = "metrics.csv"
CURVES = "curves.png"
EVENTS = "tensorboard"
LOG_SECONDS = 30.0
_SHOWN = 32


class Tracker:
    """Writes the figures of each epoch into a run's folder.

    Args:
        out: The folder.
        title: Of the plot.
        select: The images that ``accuracy`` and ``macro_f1`` are measured on.
        tensorboard: Write TensorBoard's scalars too, and the first batch as the network sees it.
    """

    def __init__(self, out: Path, title: str, select: str, tensorboard: bool) -> None:
        self.out, self.title, self.select = out, title, select
        self.draws = is_installed("matplotlib")
        if not self.draws:  # nothing else of a training needs it
            print(f"note: there will be no {CURVES}: matplotlib is not installed")
        self._history: list[dict[str, float]] = []  # that is not drawn yet
        self._drawn_at = -LOG_SECONDS
        self.events = None
        if tensorboard:  # a second to import: only where it is wanted
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(out / EVENTS))

    def add_views(self, images: Tensor, spec: ModelSpec) -> None:
        """Show augmented images, float (N, 3, S, S) as the network takes them."""
        if self.events:
            mean = images.new_tensor(spec.mean).view(3, 1, 1)
            std = images.new_tensor(spec.std).view(3, 1, 1)
            pixels = (images[:_SHOWN] * std + mean).clamp(0, 1)  # (n, 3, S, S)
            self.events.add_images("views", pixels, 0)

    def add_epoch(self, history: list[dict[str, float]]) -> None:
        """Write all epochs' figures as a table, now and then as a plot, and the last as events.

        Args:
            history: One row per epoch; all have the keys of the first.
        """
        self.set_history(history)
        if self.events:
            for name, value in history[-1].items():
                if name != "epoch":
                    self.events.add_scalar(name, value, int(history[-1]["epoch"]))
            self.events.flush()

    def set_history(self, history: list[dict[str, float]]) -> None:
        """Write the table and the plot alone, which a run that was killed may lack.

        Args:
            history: As for :meth:`add_epoch`.
        """
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.out / METRICS, table.getvalue())
        self._history = history
        # Drawing takes as long as an epoch may on a GPU.
        if time.perf_counter() - self._drawn_at >= LOG_SECONDS:
            self._draw()

    def _draw(self) -> None:
        if self.draws and self._history:
            from training.plots import plot_curves

            plot_curves(self.out / CURVES, self._history, self.title, self.select)
        self._history, self._drawn_at = [], time.perf_counter()

    def close(self) -> None:
        """Write out what is left."""
        self._draw()
        if self.events:
            self.events.close()


class EpochProgress:
    """Shows one epoch's step, loss and speed, and the time left for all epochs.

    Args:
        epoch: The epoch, from 0.
        epochs: Epochs of the whole training.
        steps: Steps of one epoch.
        batch_size: Images of one step.
        first: Steps that a run which goes on has done before.
        silent: Show nothing.
    """

    def __init__(
        self,
        epoch: int,
        epochs: int,
        steps: int,
        batch_size: int,
        first: int = 0,
        silent: bool = False,
    ) -> None:
        self.epoch, self.epochs, self.steps = epoch, epochs, steps
        self.batch_size, self.first, self.silent = batch_size, first, silent
        columns = BarColumn(10), TextColumn("{task.description}")
        hidden = silent or not sys.stdout.isatty()
        self._bar = Progress(*columns, transient=True, disable=hidden)
        self._task = self._bar.add_task(f"epoch {epoch + 1}/{epochs}", total=steps)
        self._started = self._logged = time.perf_counter()

    def update(self, step: int, loss: float) -> None:
        """Show that ``step`` steps are done, with the mean loss so far."""
        now = time.perf_counter()
        seconds = now - self._started
        done = step - self.first
        steps_left = (self.epochs - self.epoch) * self.steps - step
        line = (
            f"epoch {self.epoch + 1}/{self.epochs}, step {step}/{self.steps}: loss {loss:.4f}, "
            f"{done * self.batch_size / seconds:.0f} images/s, "
            f"{duration(steps_left * seconds / done)} left"
        )
        self._bar.update(self._task, completed=step, description=line)
        if self._bar.disable and not self.silent and now - self._logged >= LOG_SECONDS:
            self._logged = now
            print(line, flush=True)

    def __enter__(self) -> EpochProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
