"""Results as JSON, as tables and as a plot; ``python benchmarks/report.py RESULT.json`` shows one.

rich and matplotlib are imported where they draw, so that a result can be read without them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import SCHEMA_VERSION
from efficientface_deploy.artifact import atomic_path, require_file, write_text
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

Result = dict[str, Any]
Case = dict[str, Any]

COMPUTE = "compute"
END_TO_END = "end to end"

_KINDS = {"latency": "cases", "accuracy": "rows"}
_PLAIN_WIDTH = 160  # of a file or pipe, which has none of its own


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Options of ``python benchmarks/report.py``."""

    result: Path = option(positional=True, help="latency.json or accuracy.json", metavar="RESULT")
    plot: Path | None = option(None, help="draw the latencies again, as PNG", metavar="FILE")


def require_libraries() -> None:
    """Ask for what draws before the measurement rather than after it.

    Raises:
        ConfigError: rich or matplotlib is not installed.
    """
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "benchmarks",
            expected="rich and matplotlib",
            found=f"no {' and no '.join(missing)}",
            fix="pip install 'efficientface-deploy[bench]'",
        )


def write_result(result: Result, path: Path) -> None:
    """Write a result as JSON, atomically; paths become text."""
    text = json.dumps(result, indent=1, default=str, allow_nan=False)
    write_text(path, text + "\n")


def read_result(path: Path) -> Result:
    """Read what :func:`write_result` wrote.

    Raises:
        ArtifactError: The file is missing, something else, or of another schema.
    """
    require_file(path, "a benchmark's result")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = result[_KINDS[result["kind"]]]
        valid = result["schema"] == SCHEMA_VERSION and isinstance(rows, list)
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise ArtifactError(
            path,
            expected=f"a result of benchmarks/latency.py or accuracy.py, schema {SCHEMA_VERSION}",
            found="something else",
            fix="measure again with this version",
        )
    return dict(result)


def console() -> Console:
    """Standard output; wide enough for the tables when it is no terminal."""
    from rich.console import Console

    output = Console(highlight=False)
    return output if output.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def show(result: Result, output: Console) -> None:
    """Print a result: machine, tables, what is absent, warnings."""
    output.print(headline(result), markup=False)
    if result["kind"] == "latency":
        output.print(latency_table(result))
    else:
        output.print(accuracy_table(result))
    if result["absent"]:
        output.print(absent_table(result["absent"]))
    for warning in result["warnings"]:
        output.print(f"warning: {warning}", style="yellow", markup=False)


def headline(result: Result) -> str:
    """Machine, versions, commit and date on one line."""
    machine, software, git = result["machine"], result["software"], result["git"]
    gpus = [gpu["name"] for gpu in machine["gpus"]]
    packages = software["packages"]
    shown = [name for name in ("onnxruntime", "onnxruntime-gpu", "torch") if name in packages]
    shown += [name for name in packages if name.startswith("tensorrt")]
    commit = (git["commit"] or "no commit")[:9] + ("+changes" if git["dirty"] else "")
    parts = [
        *gpus,
        f"{machine['board'] or machine['cpu']}, {machine['usable_cpus']} CPUs",
        software["os"],
        f"Python {software['python']}",
        *(f"{name} {packages[name]}" for name in shown),
        commit,
        result["date"],
    ]
    return " · ".join(parts)


def latency_table(result: Result) -> Table:
    """One row per case: percentiles, throughput, speed-up over the baseline."""
    from rich.table import Table

    notes = (
        f"{COMPUTE}: a preprocessed uint8 batch in, probabilities out",
        f"{END_TO_END}: one JPEG in memory in, a label out",
        f"speed-up: ratio of medians to {_plain(result['baseline'])}, same work and threads",
    )
    table = Table(title="Latency, milliseconds a call", caption="\n".join(notes))
    for name in ("Model", "Backend", "Precision"):
        table.add_column(name, overflow="fold")
    for name in ("Threads", "p50", "p90", "p99", "min", "images/s", "Speed-up (95 %)"):
        table.add_column(name, justify="right")
    for title, cases in panels(result["cases"]):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for case in cases:
            table.add_row(*_latency_cells(case))
    return table


def accuracy_table(result: Result) -> Table:
    """One row per model and backend: how good, and how near to the reference."""
    from rich.table import Table

    data = result["data"]
    title = f"{data['name']}, {data['split']} split, {data['images']} images"
    caption = f"agreement, KL and difference: against {result['reference']}"
    table = Table(title=_plain(title), caption=_plain(caption))
    for name in ("Model", "Backend", "Precision"):
        table.add_column(name, overflow="fold")
    columns = ("Accuracy %", "Macro-F1 %", "ECE %", "Agreement %", "Mean KL", "Max |dp|", "MiB")
    for name in columns:
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            _plain(row["model"]),
            row["backend"],
            row["precision"] or "?",
            *(f"{100 * row[key]:.2f}" for key in ("accuracy", "macro_f1", "ece", "agreement")),
            f"{row['mean_kl']:.2g}",
            f"{row['max_probability_difference']:.2g}",
            f"{row['bytes'] / 2**20:.2f}",
        )
    return table


def absent_table(absent: Sequence[dict[str, str]]) -> Table:
    """What was not measured, and why; one row per backend and reason."""
    from rich.table import Table

    models: dict[tuple[str, str], list[str]] = {}
    for entry in absent:
        models.setdefault((entry["backend"], entry["reason"]), []).append(entry["model"])
    table = Table(title="Not measured here")
    table.add_column("Backend")
    table.add_column("Model", overflow="fold")
    table.add_column("Why", overflow="fold")
    for (backend, reason), names in models.items():
        table.add_row(backend, _plain(", ".join(filter(None, names))), _plain(reason))
    return table


def panels(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    """Cases that do the same work, with the name of that work; compute first, by batch."""
    found: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        found.setdefault((case["stage"], case["batch"]), []).append(case)
    ordered = sorted(found.items(), key=lambda item: (item[0][0] != COMPUTE, item[0][1]))
    return [
        (f"{stage}, batch {batch}" if stage == COMPUTE else stage, group)
        for (stage, batch), group in ordered
    ]


def plot_latency(result: Result, path: Path) -> None:
    """Draw the latencies as PNG, atomically: one panel per kind of work, one line per contender.

    The dot is the median, the thick line goes from the minimum to p90, the thin one to p99.
    """
    from matplotlib.figure import Figure

    groups = panels(result["cases"])
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    tallest = max(len(cases) for _, cases in groups)
    size = (7.5 * columns, rows * (1.2 + 0.32 * tallest) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    backends = list(dict.fromkeys(case["backend"] for case in result["cases"]))
    colours = {backend: f"C{index}" for index, backend in enumerate(backends)}
    for axis, (title, cases) in zip(axes, groups, strict=False):
        _draw_panel(axis, title, cases, colours)
    for axis in axes[len(groups) :]:
        axis.remove()
    busy = any(case["busy"] for case in result["cases"])
    note = " (the machine was busy: measure again)" if busy else ""
    figure.suptitle("Latency: dot p50, thick to p90, thin to p99" + note, fontsize=11)
    figure.supxlabel(headline(result), fontsize=6, wrap=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_panel(axis: Axes, title: str, cases: Sequence[Case], colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogFormatter

    for position, case in enumerate(cases):
        colour = colours[case["backend"]]
        axis.plot([case["min_ms"], case["p99_ms"]], [position] * 2, color=colour, linewidth=1)
        axis.plot([case["min_ms"], case["p90_ms"]], [position] * 2, color=colour, linewidth=5)
        axis.plot(case["p50_ms"], position, "o", color=colour, markeredgecolor="white")
        axis.annotate(
            _digits(case["p50_ms"]),
            (case["p99_ms"], position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    labels = [_contender_label(case) for case in cases]
    axis.set_yticks(range(len(cases)), labels, fontsize=7)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    # Backends differ by an order of magnitude; equal distances are equal ratios.
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axis.margins(x=0.12)
    axis.grid(axis="x", which="both", linewidth=0.3)
    axis.tick_params(axis="x", which="both", labelsize=7)
    axis.set_xlabel("ms a call", fontsize=8)
    axis.set_title(title, fontsize=9)


def _contender_label(case: Case) -> str:
    threads = "" if case["threads"] is None else f", {case['threads']} thr."
    return f"{case['model']}\n{case['backend']}{threads}"


def _latency_cells(case: Case) -> list[str]:
    threads = "" if case["threads"] is None else str(case["threads"])
    times = [_digits(case[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "min_ms")]
    speedup = case["speedup"]
    ratio = ""
    if speedup is not None:
        ratio = f"{speedup['value']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})"
    return [
        _plain(case["model"]),
        case["backend"],
        case["precision"] or "?",
        threads,
        *times,
        _digits(case["images_per_second"]),
        ratio,
    ]


def _digits(value: float) -> str:
    """Three digits, and no exponent: 0.0123, 1.23, 1234."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _plain(text: str) -> str:
    """Text for a table cell, in which rich would take ``[cpu]`` for a style."""
    from rich.markup import escape

    return escape(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/report.py``."""
    config = parse_config(
        ReportConfig, argv, prog="benchmarks/report.py", description="Show a benchmark's result."
    )
    require_libraries()
    result = read_result(config.result)
    if config.plot is not None:
        if result["kind"] != "latency":
            raise ConfigError(
                "--plot",
                expected="a latency result",
                found=f"{result['kind']} in {config.result}",
                fix="leave --plot out",
            )
        plot_latency(result, config.plot)
    show(result, console())
    return 0


if __name__ == "__main__":
    run_command(main)
