"""The two plots of an evaluation: confusion matrix and reliability."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from efficientface_deploy.files import atomic_path, write_text


def plot_confusion(path: Path, matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Draw a confusion matrix as PNG: colour is the share of the row, the text the count.

    Args:
        path: Target.
        matrix: Images, (C, C); row = label, column = prediction.
        labels: C class names.
    """
    counts = np.asarray(matrix)  # (C, C)
    shares = row_shares(counts)
    side = 2.5 + 0.6 * len(labels)
    # A label comes from a file: matplotlib would take its dollar signs for formulas.
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(side + 1, side), layout="constrained")
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
        _save(figure, path)


def row_shares(counts: np.ndarray[Any, np.dtype[np.integer[Any]]]) -> np.ndarray[Any, Any]:
    """Each row of (C, C) divided by its sum, float64; a class without images has zeros."""
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def plot_reliability(path: Path, bins: Mapping[str, Sequence[float | None]], error: float) -> None:
    """Draw accuracy over confidence as PNG, and below it how many images each bin holds.

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

    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(centres[filled], accuracy, width, color="tab:blue", edgecolor="white")
    upper.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
    upper.plot(confidence, accuracy, ".-", color="tab:red", label="accuracy at mean confidence")
    upper.set(ylabel="accuracy", ylim=(0, 1), title=f"ECE {error:.4f}, {count.sum():,} images")
    upper.legend(loc="upper left", fontsize=8)
    lower.bar(centres, count, width, color="tab:grey", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


METRICS = "metrics.csv"


CURVES = "curves.png"


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
