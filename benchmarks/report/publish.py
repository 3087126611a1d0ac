"""Results shown: on the terminal, and as Markdown with plots beside it.

rich and matplotlib are imported where they draw: reading a result needs neither.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report.compare import Comparison
from benchmarks.report.kinds import tables_of
from benchmarks.report.plots import PLOTS, save_plot
from benchmarks.report.result import (
    RESULTS,
    Result,
    default_folder,
    headline,
    read_result,
    write_result,
)
from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import check_writable, write_text
from efficientface_deploy.workbench.requirements import require_package
from efficientface_deploy.workbench.tables import Table

if TYPE_CHECKING:
    from rich.console import Console

# Said in every report: figures travel without their documentation.
METHOD = """\
Candidates take turns in rounds of random order, and each call has another input. Latencies are of
one machine, one caller and warm caches: another CPU orders formats and backends otherwise. Two rows
differ only where their intervals do. The roofline is arithmetic at the peak of a matrix product,
not a limit that any implementation reaches. Accuracy is of the data set that is named, not of other
pictures, cameras or people. docs/benchmarks.md has the method, and what may not be concluded.
"""

_PLAIN_WIDTH = 180  # of a file or pipe, which has none of its own

# Columns that a terminal which is too narrow does without, the first first.
_LEFT_OUT_FIRST = (
    *("SHA-256", "Network", "Input", ">p95", ">min", ">CPUs", ">p99", ">max", ">Runs", ">process"),
    *(">mJ an image", ">Difference", ">x roofline", "Precision", ">images/s", ">first label"),
    *(">load", ">Max |dp|", ">Mean KL", ">ECE %", ">p90", "Tried", "Trained on", "Offline"),
)


def run_benchmark(
    command: str,
    config_class: type[Any],
    run: Callable[[Any], Result],
    argv: Sequence[str] | None,
    description: str | None,
    example: str,
    kind: str = "",
    folder: str = "benchmarks",
    failed: Callable[[Result], bool] = lambda result: False,
) -> int:
    """The command of a benchmark: read the options, measure, write the result and show it.

    Args:
        command: Its file's name, e.g. ``latency``.
        config_class: The options.
        run: Measures.
        argv: Arguments; None reads ``sys.argv``.
        description: For ``--help``.
        example: Arguments, for ``--help`` too.
        kind: The result's, where it is not called as the command is.
        folder: Of the command.
        failed: Whether a result is a failure, for the exit code.

    Returns:
        1 after a result that is a failure, else 0.
    """
    config = parse_config(
        config_class,
        argv,
        prog=f"python {folder}/{command}.py",
        description=description or "",
        example=example,
    )
    require_libraries()
    check_out(config.out, kind or command)
    result = run(config)
    publish(result, config.out)
    return int(failed(result))


def out_option() -> Any:
    """The option ``--out`` of every benchmark's command."""
    default = "a new one in benchmarks/results"
    return option(
        None, metavar="DIR", help=f"folder of the result (default: {default})", first=True
    )


def check_out(out: Path | None, kind: str) -> None:
    """Refuse, before the work, a folder that a result cannot be written to.

    Args:
        out: The folder; None for a new one.
        kind: The result's.

    Raises:
        ConfigError: It cannot be written, or holds an earlier result of this kind.
    """
    check_writable(RESULTS if out is None else out)
    if out is not None and (path := out / f"{kind}.json").exists():
        fix = "choose another --out, or remove it"
        raise ConfigError(path, "no result yet", "that of an earlier run", fix)


def require_libraries() -> None:
    """Ask for what draws before the measurement rather than after it.

    Raises:
        BackendError: rich or matplotlib is not installed.
    """
    for module in ("rich", "matplotlib"):
        require_package(module, "benchmarks")


def publish(result: Result, out: Path | None) -> Path:
    """Write a new result as JSON, Markdown and, where calls were timed, PNG; print it.

    Args:
        result: What a command measured.
        out: Folder to write to; None makes one by kind, date and machine.

    Returns:
        Path of the JSON file.
    """
    path = (out or default_folder(result)) / f"{result['kind']}.json"
    write_result(result, path)
    read = read_result(path)
    write_text(path.with_suffix(".md"), "\n".join(_section(read)))
    written = [path.name, path.with_suffix(".md").name]
    if read["kind"] in PLOTS:
        save_plot(PLOTS[read["kind"]](read), path.with_suffix(".png"))
        written.append(path.with_suffix(".png").name)
    output = console()
    show(read, output)
    output.print(f"wrote {' and '.join(written)} to {path.parent}", markup=False)
    return path


def write_report(results: Sequence[Result], comparison: Comparison | None, folder: Path) -> None:
    """Write ``report.md`` on all results, and beside it a plot of each whose calls were timed."""
    parts, plots = ["# EfficientFace Deploy: measured\n"], {}
    if comparison is not None:
        parts += ["## Compared\n", comparison.table.to_markdown()]
        parts += [f"- Warning: {warning}" for warning in comparison.warnings]
        parts += [f"- **Regression:** {line}" for line in comparison.regressions] + [""]
    for number, result in enumerate(results, start=1):
        date = (result.get("date") or "")[:10]
        parts.append(f"## {result['kind'].capitalize()}{date and f', {date}'}\n")
        parts += _section(result)
        if result["kind"] in PLOTS:
            name = f"{result['kind']}-{number}.png"
            plots[name] = PLOTS[result["kind"]](result)
            parts.append(f"![{result['kind'].capitalize()}]({name})\n")
    parts += ["## How it was measured, and what may not be concluded\n", METHOD]
    for name, plot in plots.items():
        save_plot(plot, folder / name)
    write_text(folder / "report.md", "\n".join(parts))


def _section(result: Result) -> list[str]:
    """A result as Markdown: machine, warnings, tables."""
    warnings = [f"> Warning: {warning}\n" for warning in result["warnings"]]
    return [f"{headline(result)}\n", *warnings, *(t.to_markdown() for t in tables_of(result))]


def show(result: Result, output: Console) -> None:
    """Print a result: machine, tables, what is absent, warnings."""
    output.print(headline(result), markup=False)
    for table in tables_of(result):
        output.print(_fitted(table, output))
    for warning in result["warnings"]:
        output.print(f"warning: {warning}", style="yellow", markup=False)


def _fitted(table: Table, output: Console) -> Table:
    """The table without as many columns as it takes to fit the output's width."""
    missing = []
    for name in _LEFT_OUT_FIRST:
        unbounded = output.options.update(max_width=10_000)
        if output.measure(table, options=unbounded).maximum <= output.width:
            break
        if name in table.columns:
            table = _without(table, name)
            missing.append(name.removeprefix(">"))
    if not missing:
        return table
    note = f"too narrow here for {', '.join(missing)}: see the Markdown file"
    return dataclasses.replace(table, notes=[*table.notes, note])


def _without(table: Table, column: str) -> Table:
    """The table without a column, and without the note on it."""
    at = list(table.columns).index(column)
    rows = [row if len(row) == 1 else [*row[:at], *row[at + 1 :]] for row in table.rows]
    columns = [*table.columns[:at], *table.columns[at + 1 :]]
    notes = [note for note in table.notes if not note.startswith(f"{column.removeprefix('>')}:")]
    return dataclasses.replace(table, columns=columns, rows=rows, notes=notes)


def show_comparison(comparison: Comparison, output: Console) -> None:
    """Print a comparison: ratios or differences, warnings, what became worse."""
    output.print(comparison.table)
    for warning in comparison.warnings:
        output.print(f"warning: {warning}", style="yellow", markup=False)
    for regression in comparison.regressions:
        output.print(f"regression: {regression}", style="red", markup=False)
    if not comparison.regressions and comparison.judged:
        output.print("no regression beyond the noise", markup=False)


def console() -> Console:
    """Standard output; where neither it nor COLUMNS has a width, wide enough for the tables."""
    from rich.console import Console

    output = Console(highlight=False)
    has_width = output.is_terminal or "COLUMNS" in os.environ
    return output if has_width else Console(highlight=False, width=_PLAIN_WIDTH)
