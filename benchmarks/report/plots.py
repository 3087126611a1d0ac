"""The plot of a result, as PNG. matplotlib is imported where it draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report.result import Result, Row, headline, panels
from benchmarks.report.tables import count, digits
from efficientface_deploy.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL_WIDTH = 7.5  # inches
_ROW_HEIGHT = 0.32


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def latency_plot(result: Result) -> Figure:
    """One panel per kind of work, one line per candidate: how long the calls took."""
    from matplotlib.figure import Figure

    cases = result["cases"]
    groups = panels(cases)
    columns = min(2, len(groups))
    lines = math.ceil(len(groups) / columns)
    height = lines * (1.2 + _ROW_HEIGHT * max(map(len, groups.values()))) + 0.8
    figure = Figure(figsize=(_PANEL_WIDTH * columns, height), layout="constrained")
    noisy = any(case.get("busy") for case in cases)
    title = "Latency: dot p50, thick to p90, thin to p99"
    title += " (the machine was noisy: measure again)" if noisy else ""
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(headline(result), fontsize=6, wrap=True)

    candidates = dict.fromkeys((case["model"], case["backend"]) for case in cases)
    colours = {one: f"C{number}" for number, one in enumerate(candidates)}
    axes = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axis, (work, own) in zip(axes, groups.items(), strict=False):
        axis.set_title(work, fontsize=9)
        _draw_distributions(axis, own, colours)
    for axis in axes[len(groups) :]:
        axis.remove()
    return figure


def _draw_distributions(
    axis: Axes, cases: Sequence[Row], colours: Mapping[tuple[str, str], str]
) -> None:
    from matplotlib.ticker import LogLocator

    names = []
    for position, case in enumerate(cases):
        colour = colours[case["model"], case["backend"]]
        axis.plot([case["min_ms"], case["p99_ms"]], [position] * 2, color=colour, linewidth=1.2)
        axis.plot([case["min_ms"], case["p90_ms"]], [position] * 2, color=colour, linewidth=5)
        axis.plot(case["p50_ms"], position, "o", color=colour, markeredgecolor="white")
        axis.text(case["p99_ms"], position, f"  {digits(case['p50_ms'])}", va="center", fontsize=8)
        threads = case.get("threads")
        suffix = "" if threads is None else f", {count(threads, 'thread')}"
        names.append(f"{case['model']}\n{case['backend']}{suffix}")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)  # from the top down
    # Backends differ by an order of magnitude; equal distances are equal ratios.
    axis.set_xscale("log")
    shortest, longest = min(case["min_ms"] for case in cases), max(case["p99_ms"] for case in cases)
    decades = math.log10(max(longest, 1e-6) / max(shortest, 1e-6))
    subs = (1, 2, 5) if decades < 1.4 else (1, 3) if decades < 2.4 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.margins(x=0.16)
    axis.set_xlabel("ms a call", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(axis="x", linewidth=0.3)
    axis.set_axisbelow(True)


def annotate_plot(result: Result) -> Figure:
    """Pictures a second and peak memory as the set grows, a line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL_WIDTH, 3.4), layout="constrained")
    figure.supxlabel(headline(result), fontsize=6, wrap=True)
    left, right = figure.subplots(1, 2)
    for way in dict.fromkeys(case["way"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["way"] == way]
        counts = [case["pictures"] for case in cases]
        left.plot(counts, [case["pictures_per_second"] for case in cases], "o-", label=way)
        right.plot(counts, [case["peak_bytes"] / 1e6 for case in cases], "o-", label=way)
    for axis, title in ((left, "pictures a second"), (right, "peak memory, MB")):
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("pictures", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(linewidth=0.3)
    left.legend(fontsize=7)
    return figure


# The plot of each kind that has one.
PLOTS = {"latency": latency_plot, "peers": latency_plot, "annotate": annotate_plot}
