"""Results as Markdown, and as one HTML page that needs no other file and no network."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.report.compare import Comparison
from benchmarks.report.plots import Plot, match_accuracy, plots_of, tradeoff_plots
from benchmarks.report.result import (
    COMPUTE,
    TIMED,
    Case,
    Result,
    digits,
    floor_distance,
    headline,
    rows_of,
)
from benchmarks.report.tables import GOALS, tables_of

TITLE = "EfficientFace Deploy: measured"

# Said on every page: figures travel without their documentation.
CAVEATS = (
    "Latencies are of one machine, one caller, and warm caches between calls; another CPU orders "
    "formats and backends otherwise.",
    "Two rows differ only where their intervals do. Nothing beyond p99 is measured, and the p99 "
    "of under 100 calls is near the maximum.",
    "Speed-ups refer to the baseline that is named, on as many threads, not to the best that could "
    "be made of it.",
    "The floor is arithmetic at the peak of a matrix product on this machine, not a limit that any "
    "implementation reaches.",
    "Accuracy is of the data set that is named. It says nothing of other pictures, cameras or "
    "people, and a recognised expression is not a feeling.",
)
METHOD = (
    "Contenders take turns in rounds of random order after a warm-up, each call has another "
    "input, and every call is timed by perf_counter_ns. Intervals of speed-ups are bootstraps over "
    "rounds, those of accuracy are over images. docs/benchmarks.md has the whole method."
)

_NAMES = {"latency": "Latency", "accuracy": "Accuracy", "peers": "Beside what others would pick"}
_NAMES |= {"graphs": "Layouts of the graph", "export": "Export", "training": "Training steps"}


def as_markdown(results: Sequence[Result], comparison: Comparison | None = None) -> str:
    """All results, one after the other, as Markdown."""
    parts = [f"# {TITLE}", ""]
    if comparison is not None:
        parts += ["## Compared", "", comparison.table.to_markdown()]
        parts += [f"- Warning: {warning}" for warning in comparison.warnings]
        parts += [f"- **Regression:** {line}" for line in comparison.regressions] + [""]
    for result in results:
        parts += [f"## {_section(result)}", "", headline(result), ""]
        parts += [f"> Warning: {warning}\n" for warning in result["warnings"]]
        parts += [table.to_markdown() for table in tables_of(result)]
    parts += ["## How it was measured, and what may not be concluded", "", METHOD, ""]
    parts += [f"- {caveat}" for caveat in CAVEATS]
    return "\n".join(parts) + "\n"


def as_html(results: Sequence[Result], comparison: Comparison | None = None) -> str:
    """All results on one page, with plots."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    tiles = _tiles(results)
    parts = [f"<h1>{html.escape(TITLE)}</h1>"]
    parts.append(f'<p class="meta">{html.escape(", ".join(map(_section, results)))}</p>')
    if tiles:
        parts.append(f'<ul class="tiles">{"".join(tiles)}</ul>')
    if comparison is not None:
        parts.append(_comparison(comparison))
    numbers = itertools.count(1)
    parts += _tradeoffs(results, numbers)
    for result, plots in plots_of(results):
        parts.append(f"<section><h2>{html.escape(_section(result))}</h2>")
        parts.append(f'<p class="meta">{html.escape(headline(result))}</p>')
        parts.append(_list("warnings", "Before you read on", result["warnings"]))
        tables = tables_of(result)
        goals = [table for table in tables if table.title == GOALS]
        parts += [table.to_html() for table in goals]
        parts.append(_plots(plots, numbers))
        parts += [table.to_html() for table in tables if table not in goals]
        parts.append("</section>")
    parts.append("<h2>How it was measured, and what may not be concluded</h2>")
    parts.append(f"<p>{html.escape(METHOD)}</p>")
    caveats = "".join(f"<li>{html.escape(caveat)}</li>" for caveat in CAVEATS)
    parts.append(f'<ul class="method">{caveats}</ul>')
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(TITLE)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(result: Result) -> str:
    name = _NAMES.get(result["kind"], str(result["kind"]))
    date = str(result.get("date") or "")[:10]
    return f"{name}, {date}" if date else name


def _tradeoffs(results: Sequence[Result], numbers: Iterator[int]) -> list[str]:
    """Accuracy by latency, of each pair of results that have models in common."""
    parts = []
    scored = [result for result in results if result["kind"] == "accuracy"]
    for latency in (result for result in results if result["kind"] in TIMED):
        for accuracy in scored:
            plots = tradeoff_plots(latency, accuracy)
            if plots:
                left_out = {row["model"] for row in rows_of(latency)}
                left_out -= match_accuracy(latency, accuracy).keys()
                note = ", ".join(sorted(left_out))
                parts.append("<section><h2>Accuracy by latency</h2>")
                if note:
                    parts.append(
                        f'<p class="meta">Not drawn, since their accuracy is not in the results: '
                        f"{html.escape(note)}</p>"
                    )
                parts += [_plots(plots, numbers), "</section>"]
    return parts


def _plots(plots: Sequence[Plot], numbers: Iterator[int]) -> str:
    figures = "".join(
        f'<figure class="plot"><figcaption>{html.escape(plot.title)}'
        f"<small>{html.escape(plot.caption)}</small></figcaption>"
        f"{plot.numbered(next(numbers))}</figure>"
        for plot in plots
    )
    return f'<div class="plots">{figures}</div>' if figures else ""


def _comparison(comparison: Comparison) -> str:
    lines = _list("warnings", "Before you read on", comparison.warnings)
    if comparison.regressions:
        lines += _list("warnings regressions", "Worse beyond the noise", comparison.regressions)
    elif comparison.judged:
        lines += "<p>Nothing became worse beyond the noise.</p>"
    return f"<section><h2>Compared</h2>{lines}{comparison.table.to_html()}</section>"


def _list(kind: str, title: str, lines: Sequence[object]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(str(line))}</li>" for line in lines)
    return f'<div class="{kind}"><strong>{html.escape(title)}</strong><ul>{items}</ul></div>'


def _tiles(results: Sequence[Result]) -> list[str]:
    """The figures that a reader looks for first."""
    tiles = []
    for result in results:
        if result["kind"] == "latency":
            tiles += _latency_tiles(result)
        elif result["kind"] == "accuracy":
            best = max(rows_of(result), key=lambda row: float(row["accuracy"]))
            detail = f"{best['model']}, {result['data']['name']}"
            tiles.append(_tile("best accuracy", f"{100 * best['accuracy']:.2f} %", detail))
    return tiles


def _latency_tiles(result: Result) -> list[str]:
    singles = [case for case in rows_of(result) if (case["stage"], case["batch"]) == (COMPUTE, 1)]
    tiles = []
    if singles:
        fastest = min(singles, key=lambda case: float(case["p50_ms"]))
        where = _where(fastest)
        tiles.append(_tile("fastest, batch 1, p50", f"{digits(fastest['p50_ms'])} ms", where))
        gain = fastest.get("speedup")
        if gain:
            detail = f"{gain['low']:.1f} to {gain['high']:.1f}, over {result.get('baseline')}"
            tiles.append(_tile("faster than the baseline", f"{gain['value']:.1f}x", detail))
    most = max(rows_of(result), key=lambda case: float(case["images_per_second"]), default=None)
    if most is not None:
        value = f"{digits(most['images_per_second'])} /s"
        tiles.append(_tile("most images a second", value, f"batch {most['batch']}, {_where(most)}"))
    near = [(distance, case) for case in singles if (distance := floor_distance(case))]
    if near:
        distance, nearest = min(near, key=lambda pair: pair[0])
        where = _where(nearest)
        tiles.append(_tile("nearest to the floor, batch 1", f"{digits(distance)}x", where))
    return tiles


def _where(case: Case) -> str:
    threads = "" if case.get("threads") is None else f", threads: {case['threads']}"
    return f"{case['model']} on {case['backend']}{threads}"


def _tile(label: str, value: str, detail: str) -> str:
    cells = (("label", label), ("value", value), ("detail", detail))
    spans = "".join(f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in cells)
    return f"<li>{spans}</li>"
