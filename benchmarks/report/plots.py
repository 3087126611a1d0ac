"""The plots of a result: one PNG for the latencies, and small SVG figures for the page.

A figure of the page is as wide as a phone. Its colours are named by the page's style sheet, so that
the same drawing is read in light and in dark. matplotlib is imported where it draws.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report.result import (
    COMPUTE,
    Case,
    Result,
    contender_label,
    digits,
    headline,
    panels,
    rows_of,
    short_names,
)
from efficientface_deploy.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 10  # colours that the page has for models and kinds
_WIDTH = 4.7  # inches; 338 units of the SVG's own, about as many pixels as a phone is wide
_TOP_LAYERS = 12
_LONGEST_LABEL = 30  # letters, of a legend in two columns
_EXTREMES: Any = ((min, "min_ms"), (max, "p99_ms"))

# matplotlib needs colours of its own: these stand for the page's names until the SVG is written.
_INK, _MUTED, _LINE, _SURFACE = "#010101", "#020202", "#030303", "#040404"
_NAMES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _SURFACE: "surface"}
_SERIES_COLOURS = [f"#fe{number:02x}01" for number in range(SERIES)]
_NAMES |= {colour: f"series-{number}" for number, colour in enumerate(_SERIES_COLOURS)}

_STYLE: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "savefig.transparent": True,
    "svg.fonttype": "path",  # letters as shapes: nothing is clipped where a font is missing
    "svg.hashsalt": "efficientface",
}


Contender = tuple[str, str]  # model and backend


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        title: Above it.
        caption: What is drawn how.
        svg: The drawing, an SVG element.
    """

    title: str
    caption: str
    svg: str

    def numbered(self, number: int) -> str:
        """The drawing with ids of its own, since a page holds several."""
        svg = re.sub(r'\bid="', f'id="plot{number}-', self.svg)
        return re.sub(r'(href="#|url\(#)', rf"\g<1>plot{number}-", svg)


def plots_of(results: Sequence[Result]) -> list[tuple[Result, list[Plot]]]:
    """The plots of every result."""
    return [(result, _plots(result)) for result in results]


def _plots(result: Result) -> list[Plot]:
    kind = result["kind"]
    if kind in ("latency", "peers"):
        return [
            *distribution_plots(result),
            *batch_plots(result),
            *thread_plots(result),
            *profile_plots(result),
        ]
    if kind == "accuracy":
        return [accuracy_plot(result)]
    return []


def distribution_plots(result: Result) -> list[Plot]:
    """One plot for each kind of work: how long the calls of each contender took."""
    cases = rows_of(result)
    names = short_names(case["model"] for case in cases)
    colours = _colours(cases)
    plots = []
    for title, own in panels(cases):
        with _figure(1.0 + 0.42 * len(own)) as figure:
            axis = figure.subplots()
            _draw_distributions(axis, own, names, colours)
            svg = _svg(figure, f"latency, {title}")
        caption = "milliseconds a call: dot p50, thick to p90, thin from minimum to p99"
        plots.append(Plot(f"Latency: {title}", caption, svg))
    return plots


def batch_plots(result: Result) -> list[Plot]:
    """One plot for each number of threads: throughput by images in a call."""
    cases = [case for case in rows_of(result) if case["stage"] == COMPUTE]
    plots = []
    for threads in dict.fromkeys(case.get("threads") for case in cases):
        own = [case for case in cases if case.get("threads") == threads]
        if len({case["batch"] for case in own}) > 1:
            where = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
            svg = _draw_scaling(cases, own, "batch", "images in a call")
            plots.append(Plot(f"Throughput by batch{where}", "images a second, compute alone", svg))
    return plots


def thread_plots(result: Result) -> list[Plot]:
    """For the smallest and the largest batch: throughput by threads."""
    cases = [case for case in rows_of(result) if case["stage"] == COMPUTE]
    batches = sorted({case["batch"] for case in cases})
    plots = []
    for batch in dict.fromkeys([*batches[:1], *batches[-1:]]):
        own = [case for case in cases if case["batch"] == batch and case.get("threads") is not None]
        if len({case.get("threads") for case in own}) > 1:
            svg = _draw_scaling(cases, own, "threads", "threads of an inference")
            title = f"Throughput by threads, batch {batch}"
            plots.append(Plot(title, "images a second, compute alone", svg))
    return plots


def profile_plots(result: Result) -> list[Plot]:
    """The time by kind of operator, all models beside each other; the dearest layers of each."""
    profiles = [entry for entry in result.get("profiles") or [] if entry.get("kinds")]
    if not profiles:
        return []
    kinds = list(dict.fromkeys(row["kind"] for entry in profiles for row in entry["kinds"]))
    colours = {kind: _SERIES_COLOURS[index % SERIES] for index, kind in enumerate(kinds)}
    names = short_names(entry["model"] for entry in profiles)
    plots = [_kinds_plot(profiles, kinds, colours, names)]
    plots += [_layers_plot(entry, colours, names) for entry in profiles]
    return plots


def accuracy_plot(result: Result) -> Plot:
    """Accuracy of each model with its interval."""
    rows = rows_of(result)
    names = short_names(row["model"] for row in rows)
    colours = _colours(rows)
    with _figure(1.0 + 0.42 * len(rows)) as figure:
        axis = figure.subplots()
        for position, row in enumerate(rows):
            low, high = row.get("accuracy_interval") or (row["accuracy"],) * 2
            colour = colours[_contender(row)]
            axis.plot([100 * low, 100 * high], [position] * 2, color=colour, linewidth=2)
            axis.plot(100 * row["accuracy"], position, "o", color=colour, markeredgecolor=_SURFACE)
        labels = [contender_label(row, names) for row in rows]
        _name_rows(axis, labels)
        axis.margins(x=0.1)
        axis.set_xlabel("accuracy, %")
        svg = _svg(figure, "accuracy")
    return Plot("Accuracy", "with 95 % intervals over images, where the result has them", svg)


def tradeoff_plots(latency: Result, accuracy: Result) -> list[Plot]:
    """Accuracy by latency, for models that both results have; one plot for each thread count."""
    scores = match_accuracy(latency, accuracy)
    cases = [case for case in rows_of(latency) if (case["stage"], case["batch"]) == (COMPUTE, 1)]
    plots = []
    for threads in dict.fromkeys(case.get("threads") for case in cases):
        own = [
            (case, scores[case["model"]])
            for case in cases
            if case.get("threads") == threads and case["model"] in scores
        ]
        if len(own) > 1:
            where = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
            svg = _draw_tradeoff(rows_of(latency), own)
            caption = (
                f"{accuracy['data']['name']}, {accuracy['data']['split']}; right is slower, up is "
                "more accurate; lines are 95 % intervals over images"
            )
            plots.append(Plot(f"Accuracy by latency, batch 1{where}", caption, svg))
    return plots


def match_accuracy(latency: Result, accuracy: Result) -> dict[str, Case]:
    """The accuracy of each model of a latency result: the same bytes, or else the same name.

    A model that several backends scored is taken from the first.
    """
    rows = rows_of(accuracy)
    by_hash: dict[str, Case] = {}
    by_name: dict[str, Case] = {}
    for row in rows:
        by_hash.setdefault(str(row.get("sha256")), row)
        by_name.setdefault(row["model"], row)
    hashes = {model["name"]: model.get("sha256") for model in latency.get("models") or []}
    found = {}
    for name in dict.fromkeys(case["model"] for case in rows_of(latency)):
        known = hashes.get(name)
        match = by_hash.get(str(known)) if known else by_name.get(name)
        if match is not None:
            found[name] = match
    return found


def plot_latency(result: Result, path: Path) -> None:
    """Draw the latencies as PNG, atomically: one panel per kind of work, one line per contender.

    The dot is the median, the thick line goes from the minimum to p90, the thin one to p99.
    """
    from matplotlib.figure import Figure

    cases = rows_of(result)
    groups = panels(cases)
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    tallest = max(len(own) for _, own in groups)
    size = (7.5 * columns, rows * (1.2 + 0.32 * tallest) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = {case["model"]: case["model"] for case in cases}
    contenders = dict.fromkeys(map(_contender, cases))
    colours = {one: f"C{number}" for number, one in enumerate(contenders)}
    for axis, (title, own) in zip(axes, groups, strict=False):
        _draw_distributions(axis, own, names, colours, edge="white")
        axis.tick_params(axis="both", which="both", labelsize=7)
        axis.grid(axis="x", which="both", linewidth=0.3)
        axis.set_title(title, fontsize=9)
    for axis in axes[len(groups) :]:
        axis.remove()
    busy = any(case.get("busy") for case in cases)
    note = " (the machine was busy: measure again)" if busy else ""
    figure.suptitle("Latency: dot p50, thick to p90, thin to p99" + note, fontsize=11)
    figure.supxlabel(headline(result), fontsize=6, wrap=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_distributions(
    axis: Axes,
    cases: Sequence[Case],
    names: dict[str, str],
    colours: Mapping[Contender, str],
    edge: str = _SURFACE,
) -> None:
    from matplotlib.ticker import LogLocator

    for position, case in enumerate(cases):
        colour = colours[_contender(case)]
        axis.plot([case["min_ms"], case["p99_ms"]], [position] * 2, color=colour, linewidth=1.2)
        axis.plot([case["min_ms"], case["p90_ms"]], [position] * 2, color=colour, linewidth=5)
        axis.plot(case["p50_ms"], position, "o", color=colour, markeredgecolor=edge)
        axis.annotate(
            digits(case["p50_ms"]),
            (case["p99_ms"], position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    _name_rows(axis, [contender_label(case, names) for case in cases])
    # Backends differ by an order of magnitude; equal distances are equal ratios.
    axis.set_xscale("log")
    shortest, longest = (function(case[key] for case in cases) for function, key in _EXTREMES)
    decades = math.log10(max(longest, 1e-6) / max(shortest, 1e-6))
    subs = (1, 2, 5) if decades < 1.4 else (1, 3) if decades < 2.4 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.margins(x=0.16)
    axis.set_xlabel("ms a call", fontsize=8)


def _draw_scaling(all_cases: Sequence[Case], own: Sequence[Case], key: str, label: str) -> str:
    """Images a second by ``key``; a line for each model and backend."""
    names = short_names(case["model"] for case in all_cases)
    colours = _colours(all_cases)
    contenders = dict.fromkeys(map(_contender, own))
    labels = [f"{names[model]} ({backend})" for model, backend in contenders]
    with _figure(3.0 + _legend_height(labels)) as figure:
        axis = figure.subplots()
        for name, (model, backend) in zip(labels, contenders, strict=True):
            line = sorted(
                (case[key], case["images_per_second"])
                for case in own
                if _contender(case) == (model, backend)
            )
            style = "-" if backend.partition(":")[0] != "torch" else "--"
            colour = colours[model, backend]
            axis.plot(
                *zip(*line, strict=True),
                style,
                marker="o",
                markersize=4.5,
                color=colour,
                label=name,
            )
        steps = sorted({case[key] for case in own})
        axis.set_xscale("log", base=2)
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_ylabel("images/s")
        figure.legend(loc="outside lower center", ncols=_legend_columns(labels))
        return _svg(figure, f"throughput by {key}")


def _draw_tradeoff(all_cases: Sequence[Case], own: Sequence[tuple[Case, Case]]) -> str:
    names = short_names(case["model"] for case in all_cases)
    colours = _colours(all_cases)
    labels = [f"{names[case['model']]} ({case['backend']})" for case, _ in own]
    with _figure(3.2 + _legend_height(labels)) as figure:
        axis = figure.subplots()
        for label, (case, score) in zip(labels, own, strict=True):
            low, high = score.get("accuracy_interval") or (score["accuracy"],) * 2
            colour = colours[_contender(case)]
            axis.plot([case["p50_ms"]] * 2, [100 * low, 100 * high], color=colour, linewidth=1.2)
            axis.plot(
                case["p50_ms"], 100 * score["accuracy"], "o", color=colour, markersize=8,
                markeredgecolor=_SURFACE, label=label,
            )  # fmt: skip
        axis.set_xlim(left=0)
        axis.margins(0.12)
        axis.set_xlabel("p50, ms a call")
        axis.set_ylabel("accuracy, %")
        figure.legend(loc="outside lower center", ncols=_legend_columns(labels))
        return _svg(figure, "accuracy by latency")


def _kinds_plot(
    profiles: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
    colours: Mapping[str, str],
    names: dict[str, str],
) -> Plot:
    with _figure(1.3 + 0.42 * len(profiles) + 0.2 * math.ceil(len(kinds) / 2)) as figure:
        axis = figure.subplots()
        for position, profile in enumerate(profiles):
            left = 0.0
            found = {row["kind"]: row["us"] / 1e3 for row in profile["kinds"]}
            for kind in kinds:
                width = found.get(kind, 0.0)
                label = kind if position == 0 else None
                axis.barh(
                    position, width, left=left, height=0.6, color=colours[kind], label=label,
                    edgecolor=_SURFACE, linewidth=0.8,
                )  # fmt: skip
                left += width
            axis.annotate(
                digits(left), (left, position), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
        _name_rows(axis, [contender_label(dict(profile), names) for profile in profiles])
        axis.margins(x=0.12)
        axis.set_xlabel("ms a pass, under the profiler")
        figure.legend(loc="outside lower center", ncols=2)
        svg = _svg(figure, "time by kind of operator")
    return Plot("Where the time goes", "batch 1, medians by ONNX Runtime's profiler", svg)


def _layers_plot(
    profile: Mapping[str, Any], colours: Mapping[str, str], names: dict[str, str]
) -> Plot:
    layers = profile["layers"][:_TOP_LAYERS]
    with _figure(0.9 + 0.24 * len(layers)) as figure:
        axis = figure.subplots()
        for position, layer in enumerate(layers):
            axis.barh(position, layer["us"], height=0.65, color=colours[layer["kind"]])
        _name_rows(axis, [_shortened(layer["name"]) for layer in layers])
        axis.set_xlabel("us a pass, under the profiler")
        svg = _svg(figure, f"longest layers of {profile['model']}")
    title = f"The longest layers: {names[profile['model']]}"
    return Plot(title, f"{profile['backend']}; colours as in the plot of kinds", svg)


def _shortened(name: str, longest: int = 30) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _name_rows(axis: Axes, labels: Sequence[str]) -> None:
    """Name what is drawn at 0, 1, 2, ... from the top down."""
    axis.set_yticks(range(len(labels)), list(labels))
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def _contender(case: Case) -> Contender:
    return case["model"], case["backend"]


def _colours(cases: Sequence[Case]) -> dict[Contender, str]:
    """A colour for each model and backend, the same in all plots of a result."""
    contenders = dict.fromkeys(map(_contender, cases))
    return {one: _SERIES_COLOURS[index % SERIES] for index, one in enumerate(contenders)}


def _legend_columns(labels: Sequence[str]) -> int:
    """Two columns where the labels are short enough for the figure's width."""
    return 2 if max(map(len, labels), default=0) <= _LONGEST_LABEL else 1


def _legend_height(labels: Sequence[str]) -> float:
    """What a legend below the figure adds to its height, inches."""
    return 0.2 * math.ceil(len(labels) / _legend_columns(labels))


@contextlib.contextmanager
def _figure(height: float) -> Iterator[Figure]:
    """A figure in the page's style, ``height`` inches high."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def _svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element, with the page's names in the place of colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, name in _NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    width, height = figure.get_size_inches() * 72
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width:g} {height:g}" '
    head += f'role="img" aria-label="{label}">'
    return head + text[text.index(">") + 1 :]
