"""The plots of a result, as PNG. matplotlib is imported where it draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report.result import (
    COMPUTE,
    Case,
    Result,
    Row,
    digits,
    headline,
    panels,
)
from efficientface_deploy.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Candidate = tuple[str, str]  # model and backend

_PANEL_WIDTH = 7.5  # inches
_ROW_HEIGHT = 0.32


@dataclasses.dataclass(frozen=True, eq=False)
class Plot:
    """A figure.

    Attributes:
        name: What it shows, for its file's name.
        title: Above it.
        figure: The drawing.
    """

    name: str
    title: str
    figure: Figure

    def save(self, path: Path) -> None:
        """Write the figure as PNG, atomically."""
        with atomic_path(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=120)


def latency_plot(result: Result) -> Plot:
    """One panel per kind of work, one line per candidate: how long the calls took."""
    cases = result["cases"]
    groups = panels(cases)
    busy = any(case.get("busy") for case in cases)
    title = "Latency: dot p50, thick to p90, thin to p99"
    title += " (the machine was noisy: measure again)" if busy else ""
    plot, axes = _figure("latency", title, len(groups), max(len(own) for _, own in groups))
    plot.figure.supxlabel(headline(result), fontsize=6, wrap=True)
    colours = _colours(cases)
    for axis, (work, own) in zip(axes, groups, strict=True):
        axis.set_title(work, fontsize=9)
        _draw_distributions(axis, own, colours)
    return plot


def _draw_distributions(
    axis: Axes, cases: Sequence[Case], colours: Mapping[Candidate, str]
) -> None:
    from matplotlib.ticker import LogLocator

    for position, case in enumerate(cases):
        colour = colours[_candidate(case)]
        axis.plot([case["min_ms"], case["p99_ms"]], [position] * 2, color=colour, linewidth=1.2)
        axis.plot([case["min_ms"], case["p90_ms"]], [position] * 2, color=colour, linewidth=5)
        axis.plot(case["p50_ms"], position, "o", color=colour, markeredgecolor="white")
        _annotate(axis, case["p50_ms"], case["p99_ms"], position)
    _name_rows(axis, cases)
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


def tradeoff_plot(latency: Result, accuracy: Result) -> Plot | None:
    """Accuracy by latency, of the models that both results have; one panel per thread count."""
    scores = match_accuracy(latency, accuracy)
    cases = [case for case in latency["cases"] if (case["stage"], case["batch"]) == (COMPUTE, 1)]
    groups = {
        threads: [c for c in cases if c.get("threads") == threads and c["model"] in scores]
        for threads in dict.fromkeys(case.get("threads") for case in cases)
    }
    groups = {threads: own for threads, own in groups.items() if len(own) > 1}
    if not groups:
        return None
    data = accuracy["data"]
    title = f"Accuracy by latency, batch 1: {data['name']}, {data['split']}"
    plot, axes = _figure("accuracy-by-latency", title, len(groups), 12)
    colours = _colours(cases)
    for axis, (threads, own) in zip(axes, groups.items(), strict=True):
        for case in own:
            score, colour = scores[case["model"]], colours[_candidate(case)]
            ends = [100 * end for end in score.get("accuracy_interval") or ()]
            axis.plot([case["p50_ms"]] * len(ends), ends, color=colour, linewidth=1.2)
            label = "{} ({})".format(*_candidate(case))
            axis.plot(case["p50_ms"], 100 * score["accuracy"], "o", color=colour, label=label)
        axis.set_title(_threads(threads), fontsize=9)
        axis.margins(0.12)
        axis.set_xlim(left=0)
        axis.set_xlabel("p50, ms a call", fontsize=8)
        axis.set_ylabel("accuracy, %", fontsize=8)
        axis.legend(fontsize=7)
    return plot


def match_accuracy(latency: Result, accuracy: Result) -> dict[str, Row]:
    """The accuracy of each model of a latency result: the same bytes, or else the same name.

    A model that several backends scored is taken from the first.
    """
    by_hash: dict[str, Row] = {}
    by_name: dict[str, Row] = {}
    for row in accuracy["rows"]:
        by_hash.setdefault(str(row.get("sha256")), row)
        by_name.setdefault(row["model"], row)
    hashes = {model["name"]: model.get("sha256") for model in latency.get("models") or []}
    found = {}
    for name in dict.fromkeys(case["model"] for case in latency["cases"]):
        known = hashes.get(name)
        match = by_hash.get(str(known)) if known else by_name.get(name)
        if match is not None:
            found[name] = match
    return found


def _figure(name: str, title: str, count: int, rows: int) -> tuple[Plot, list[Axes]]:
    """A figure of ``count`` panels, two beside each other, each high enough for ``rows`` lines."""
    from matplotlib.figure import Figure

    columns = min(2, count)
    lines = math.ceil(count / columns)
    size = (_PANEL_WIDTH * columns, lines * (1.2 + _ROW_HEIGHT * rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.tick_params(labelsize=7)
        axis.grid(linewidth=0.3)
        axis.set_axisbelow(True)
    return Plot(name, title, figure), axes[:count]


def _name_rows(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Name what is drawn at 0, 1, 2, ... from the top down: the model; backend and threads."""
    labels = [
        f"{row['model']}\n{row['backend']}"
        + ("" if row.get("threads") is None else f", {_threads(row['threads'])}")
        for row in rows
    ]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def _annotate(axis: Axes, value: float, x: float, y: float) -> None:
    """Write a figure to the right of a place."""
    axis.annotate(
        digits(value), (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
    )


def _threads(count: int | None) -> str:
    return "" if count is None else f"{count} thread{'' if count == 1 else 's'}"


def _candidate(case: Mapping[str, Any]) -> Candidate:
    return case["model"], case["backend"]


def _colours(cases: Sequence[Case]) -> dict[Candidate, str]:
    """A colour for each model and backend, the same in all panels."""
    candidates = dict.fromkeys(map(_candidate, cases))
    return {one: f"C{number}" for number, one in enumerate(candidates)}
