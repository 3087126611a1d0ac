"""What a training leaves to look at: metrics.csv, curves.png and TensorBoard's events."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from efficientface_deploy.artifact import atomic_path, write_text
from efficientface_deploy.spec import ModelSpec

matplotlib.set_loglevel("WARNING")

METRICS = "metrics.csv"
CURVES = "curves.png"
EVENTS = "tensorboard"
_SHOWN = 32


def write_curves(out: Path, history: list[dict[str, float]], title: str, select: str) -> None:
    """Write the figures of all epochs so far as a table and as a plot.

    Args:
        out: The run's folder.
        history: One row per epoch; all have the keys of the first.
        title: Of the plot.
        select: The images that ``accuracy`` and ``macro_f1`` were measured on.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(out / METRICS, table.getvalue())

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["loss"] for row in history], marker=".", label="training loss")
    axes.set(xlabel="epoch", ylabel="loss", title=title)
    if "accuracy" in history[0]:
        right = axes.twinx()
        for key, colour in (("accuracy", "tab:green"), ("macro_f1", "tab:orange")):
            label = f"{key} on {select}"
            right.plot(epochs, [row[key] for row in history], ".-", color=colour, label=label)
        right.set(ylabel="score", ylim=(0, 1))
        right.legend(loc="lower right")
    axes.legend(loc="upper right")
    with atomic_path(out / CURVES) as temporary:
        figure.savefig(temporary, dpi=120)


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
