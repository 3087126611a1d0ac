"""Plots: PNG, of any number of rows, and accuracy beside the right latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.report.plots import latency_plot, match_accuracy, tradeoff_plot


@pytest.mark.parametrize("count", [1, 2, 4])
def test_plot_is_a_png(latency: dict[str, Any], count: int, tmp_path: Path) -> None:
    latency["cases"] = latency["cases"][:count]
    latency["cases"][0]["busy"] = True
    path = tmp_path / "latency.png"
    latency_plot(latency).save(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 500
    assert [child.name for child in tmp_path.iterdir()] == ["latency.png"]


def test_axes_say_what_they_are(latency: dict[str, Any]) -> None:
    figure = latency_plot(latency).figure
    first = figure.axes[0]
    assert (first.get_title(), first.get_xlabel()) == ("compute, batch 1", "ms a call")
    assert [label.get_text() for label in first.get_yticklabels()] == [
        "a.onnx\nonnx:cpu, 1 thread",
        "b[1].engine\ntrt",
    ]


def test_accuracy_meets_latency_by_the_files_hash(
    latency: dict[str, Any], accuracy: dict[str, Any]
) -> None:
    row = accuracy["rows"][0]
    accuracy["rows"].append(
        {**row, "model": "elsewhere.onnx", "sha256": "cd" * 32, "accuracy": 0.5}
    )
    latency["models"] = [
        {"name": "a.onnx", "sha256": "ab" * 32},  # another file of the same name
        {"name": "b[1].engine", "sha256": "cd" * 32},
    ]
    found = match_accuracy(latency, accuracy)
    assert {name: score["accuracy"] for name, score in found.items()} == {"b[1].engine": 0.5}
    row["sha256"] = "ab" * 32
    found = match_accuracy(latency, accuracy)
    assert found["a.onnx"]["accuracy"] == 0.8765
    # One of them on a GPU: no two to compare on the same threads.
    assert tradeoff_plot(latency, accuracy) is None
    latency["cases"][3]["threads"] = 1
    plot = tradeoff_plot(latency, accuracy)
    assert plot is not None and plot.title == "Accuracy by latency, batch 1: FER+, validation"
    assert [axis.get_title() for axis in plot.figure.axes] == ["1 thread"]


def test_results_without_models_in_common_draw_no_comparison(
    latency: dict[str, Any], accuracy: dict[str, Any]
) -> None:
    accuracy["rows"][0]["model"] = "other.onnx"
    assert tradeoff_plot(latency, accuracy) is None
