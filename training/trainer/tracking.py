"""What a training leaves to look at: metrics.csv, curves.png and TensorBoard's events."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import matplotlib
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.progress import duration

matplotlib.set_loglevel("WARNING")

EVENTS = "tensorboard"
_SHOWN = 32


class EventWriter:
    """TensorBoard's scalars per epoch, and once the first batch as the network sees it.

    Args:
        out: The run's folder.
    """

    def __init__(self, out: Path) -> None:
        # A second to import: only where it is wanted.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / EVENTS))

    def add_row(self, row: dict[str, float]) -> None:
        """Write one epoch's figures."""
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(row["epoch"]))
        self._writer.flush()

    def add_views(self, images: Tensor, spec: ModelSpec) -> None:
        """Show augmented images, float (N, 3, S, S) as the network takes them."""
        from torchvision.utils import make_grid

        mean = images.new_tensor(spec.mean).view(3, 1, 1)
        std = images.new_tensor(spec.std).view(3, 1, 1)
        pixels = (images[:_SHOWN] * std + mean).clamp(0, 1)  # (n, 3, S, S)
        self._writer.add_image("views", make_grid(pixels), 0)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


LOG_SECONDS = 30.0


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
