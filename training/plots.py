"""Every plot of training: curves, confusion matrix, reliability, heat maps. All are PNG files."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.font_manager
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from efficientface_deploy.files import atomic_path
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array

matplotlib.set_loglevel("WARNING")

_NO_LETTER = r"Glyph .* missing from"  # what matplotlib says of each
_WIDE_FONTS = (  # of the systems' own, for classes that are not named in Latin letters
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Sans Devanagari"),
    *("Hiragino Sans", "PingFang SC", "Arial Unicode MS", "Microsoft YaHei", "Malgun Gothic"),
)

COLUMNS = 4  # faces beside each other on a sheet


def plot_curves(
    path: Path, history: Sequence[Mapping[str, float]], title: str, select: str
) -> None:
    """Draw a training's loss and, where there are any, its scores over the epochs.

    Args:
        path: Target.
        history: One row per epoch; all have the keys of the first.
        title: Of the plot.
        select: The images that ``accuracy`` and ``macro_f1`` were measured on.
    """
    with _figure(path, 7, 4) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        draw_curves(axes, history, select)


def draw_curves(axes: Axes, history: Sequence[Mapping[str, float]], select: str) -> None:
    """Draw the curves of :func:`plot_curves`: the loss to the left, scores to the right."""
    epochs = [row["epoch"] for row in history]
    loss = [row["loss"] for row in history]
    lines = axes.plot(epochs, loss, ".-", color="tab:blue", label="training loss")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "accuracy" in history[0]:
        right = axes.twinx()
        for key, colour in (("accuracy", "tab:green"), ("macro_f1", "tab:orange")):
            label = f"{key.replace('_f1', '-F1')} on {select}"
            lines += right.plot(
                epochs, [row[key] for row in history], ".-", color=colour, label=label
            )
        right.set(ylabel="score", ylim=(0, 1))
        axes = right  # the upper one: its legend hides no line of the other
    axes.legend(handles=lines, loc="center right")


def plot_confusion(path: Path, matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Draw a confusion matrix: colour is the share of the row, the text the count.

    Args:
        path: Target.
        matrix: Images, (C, C); row = label, column = prediction.
        labels: C class names.
    """
    counts = np.asarray(matrix)  # (C, C)
    # A class without images has zeros.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (C, C)
    side = 2.5 + 0.6 * len(labels)
    with _figure(path, side + 1, side) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
        ticks = range(len(labels))
        axes.set_xticks(ticks, labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, labels)
        axes.set(xlabel="predicted", ylabel="labelled")
        figure.colorbar(image, label="share of the labelled class", shrink=0.8)


def plot_reliability(path: Path, bins: Mapping[str, Sequence[float | None]], error: float) -> None:
    """Draw accuracy over confidence, and below it how many images each bin holds.

    Args:
        path: Target.
        bins: ``confidence``, ``accuracy`` (None in an empty bin) and ``count``, B values each.
        error: Expected calibration error.
    """
    count = np.array(bins["count"], dtype=np.int64)
    filled = count > 0
    confidence = np.array(bins["confidence"], dtype=np.float64)[filled]
    accuracy = np.array(bins["accuracy"], dtype=np.float64)[filled]
    width = 1 / len(count)
    centres = (np.arange(len(count)) + 0.5) * width  # (B,)
    with _figure(path, 5, 6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.bar(centres[filled], accuracy, width, color="tab:blue", edgecolor="white")
        upper.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
        upper.plot(confidence, accuracy, ".-", color="tab:red", label="accuracy at mean confidence")
        upper.set(ylabel="accuracy", ylim=(0, 1), title=f"ECE {error:.4f}, {count.sum():,} images")
        upper.legend(loc="upper left", fontsize=8)
        lower.bar(centres, count, width, color="tab:grey", edgecolor="white")
        lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1))


def plot_heat_maps(path: Path, faces: Sequence[tuple[str, UInt8Array, Float32Array]]) -> None:
    """Draw faces on a sheet, each beside itself under its heat map.

    Args:
        path: Target.
        faces: Title, image uint8 (S, S, 3) and heat float32 (S, S), 0 to 1, of each.
    """
    columns = min(COLUMNS, len(faces))
    rows = math.ceil(len(faces) / columns)
    with _figure(path, 3.4 * columns, 2.3 * rows, dpi=100) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (title, image, heat) in zip(grid.flat, faces, strict=False):
            axes.set_title(title, fontsize=8)
            draw_heat_map(axes, image, heat)


def draw_heat_map(axes: Axes, image: UInt8Array, heat: Float32Array) -> None:
    """Draw an image, and to its right the image under its heat map."""
    side = len(image)
    axes.imshow(np.concatenate((image, image), axis=1))  # (S, 2 S, 3)
    right_half = (side - 0.5, 2 * side - 0.5, side - 0.5, -0.5)  # left, right, bottom, top
    axes.imshow(heat, extent=right_half, cmap="jet", vmin=0, vmax=1, alpha=0.45)
    axes.set(xlim=(-0.5, 2 * side - 0.5), ylim=(side - 0.5, -0.5))


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float, dpi: int = 120) -> Iterator[Figure]:
    """A figure of this size, in inches, that is written at the end of the block."""
    # Names come from files: matplotlib would take their dollar signs for formulas.
    context = matplotlib.rc_context({"text.parse_math": False, "font.family": _fonts()})
    with context, warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", _NO_LETTER)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi)
    missing = [one for one in caught if re.match(_NO_LETTER, str(one.message))]
    for one in (one for one in caught if one not in missing):
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if missing:
        text = "some names are in letters that no font of this machine has, and are shown as boxes"
        print(f"note: {path}: {text}; install one, e.g. Noto Sans", file=sys.stderr)


def _fonts() -> list[str]:
    """Matplotlib's own font, then those here that have the letters which it lacks."""
    installed = matplotlib.font_manager.get_font_names()
    own = matplotlib.rcParams["font.family"]
    return [*own, *(name for name in _WIDE_FONTS if name in installed)]
