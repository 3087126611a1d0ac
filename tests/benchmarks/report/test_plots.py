"""The plot of latencies: PNG, of any number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.report.plots import annotate_plot, latency_plot, save_plot


@pytest.mark.parametrize("count", [1, 2, 4])
def test_plot_is_a_png(latency: dict[str, Any], count: int, tmp_path: Path) -> None:
    latency["cases"] = latency["cases"][:count]
    latency["cases"][0]["busy"] = True
    path = tmp_path / "latency.png"
    save_plot(latency_plot(latency), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 500
    assert [child.name for child in tmp_path.iterdir()] == ["latency.png"]


def test_axes_say_what_they_are(latency: dict[str, Any]) -> None:
    figure = latency_plot(latency)
    first = figure.axes[0]
    assert (first.get_title(), first.get_xlabel()) == ("compute, batch 1", "ms a call")
    assert [label.get_text() for label in first.get_yticklabels()] == [
        "a.onnx\nonnx:cpu, 1 thread",
        "b[1].engine\ntrt",
    ]


def test_a_line_for_each_way_as_the_set_grows() -> None:
    cases = [
        {"way": way, "pictures": count, "pictures_per_second": rate, "peak_bytes": 2e8}
        for way, rate in (("1 thread", 300.0), ("2 threads", 590.0))
        for count in (1000, 10_000)
    ]
    rates, memory = annotate_plot({"machine": {}, "cases": cases}).axes
    assert [list(line.get_ydata()) for line in rates.lines] == [[300, 300], [590, 590]]
    assert [list(line.get_xdata()) for line in memory.lines] == [[1000, 10_000]] * 2
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["1 thread", "2 threads"]
