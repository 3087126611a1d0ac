"""Results as tables, Markdown, and one page with plots; two results compared.

``python -m benchmarks.report RESULT.json`` shows one; with ``--out`` it writes ``report.md`` and
``report.html``, which needs no other file and no network. ``--compare OLD.json`` prints ratios and
names what became slower beyond the noise. ``--readme`` writes README's tables from the results
that it names. rich and matplotlib are imported where they draw: reading a result needs neither.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.page import as_html, as_markdown
from benchmarks.report.compare import TOLERANCE, Comparison, compare
from benchmarks.report.plots import plot_latency
from benchmarks.report.readme import update_readme
from benchmarks.report.result import (
    COMPUTE,
    END_TO_END,
    TIMED,
    Case,
    Result,
    headline,
    panels,
    read_result,
    refuse_damaged,
    write_result,
)
from benchmarks.report.tables import absent_table, accuracy_table, latency_table
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import write_text

if TYPE_CHECKING:
    from rich.console import Console
from benchmarks.report.tables import console, require_libraries, show

__all__ = [
    "COMPUTE",
    "END_TO_END",
    "Case",
    "Result",
    "absent_table",
    "accuracy_table",
    "console",
    "headline",
    "latency_table",
    "main",
    "panels",
    "plot_latency",
    "read_result",
    "require_libraries",
    "show",
    "show_comparison",
    "write_result",
]


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Options of ``python benchmarks/report/__main__.py``."""

    results: tuple[Path, ...] = option(
        (),
        positional=True,
        help="results of benchmarks/, the newest where --compare",
        metavar="RESULT",
    )
    out: Path | None = option(None, help="write report.md and report.html there", metavar="DIR")
    compare: Path | None = option(None, help="an older result of the same kind", metavar="OLD")
    tolerance: float = option(
        TOLERANCE,
        metavar="SHARE",
        minimum=0,
        help="what two runs may differ by without being told apart",
    )
    fail_on_regression: bool = option(False, help="with --compare: exit 1 where one is found")
    readme: bool = option(False, help="write README's tables from the results that it names")
    plot: Path | None = option(None, help="draw the latencies again, as PNG", metavar="FILE")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/report/__main__.py``."""
    config = parse_config(
        ReportConfig,
        argv,
        prog="benchmarks/report/__main__.py",
        description="Show results of the benchmarks, as tables and as a page; compare two.",
    )
    require_libraries()
    output = console()
    if config.readme:
        changed = update_readme()
        output.print("README.md " + ("rewritten" if changed else "is up to date"), markup=False)
    results = [read_result(path) for path in config.results]
    _check(config, results)
    read = [*config.results, *([config.compare] if config.compare else [])]
    with refuse_damaged(*read):
        return _report(config, results, output)


def _report(config: ReportConfig, results: Sequence[Result], output: Console) -> int:
    comparison = None
    if config.compare is not None:
        comparison = compare(
            config.compare, config.results[0], config.tolerance, strict=config.fail_on_regression
        )
    if config.plot is not None:
        plot_latency(results[0], config.plot)
    if config.out is not None:
        markdown, page = as_markdown(results, comparison), as_html(results, comparison)
        write_text(config.out / "report.md", markdown)
        write_text(config.out / "report.html", page)
        output.print(f"wrote report.md and report.html to {config.out}", markup=False)
    elif comparison is not None:
        show_comparison(comparison, output)
    else:
        for result in results:
            show(result, output)
    found = comparison is not None and bool(comparison.regressions)
    return 1 if found and config.fail_on_regression else 0


def _check(config: ReportConfig, results: Sequence[Result]) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigError: Says which.
    """
    if not results and not config.readme:
        raise ConfigError("RESULT", "a result", "none", "give latency.json or another result")
    if config.compare is not None and len(results) != 1:
        raise ConfigError(
            "--compare",
            "one result to compare with it",
            str(len(results)),
            "give the newer result alone",
        )
    if config.fail_on_regression and config.compare is None:
        raise ConfigError(
            "--fail-on-regression",
            "--compare OLD",
            "nothing to compare with",
            "give the older result with --compare",
        )
    if config.plot is not None and (not results or results[0]["kind"] not in TIMED):
        found = f"{results[0]['kind']} in {config.results[0]}" if results else "none"
        raise ConfigError("--plot", "a latency result", found, "leave --plot out")


def show_comparison(comparison: Comparison, output: Console) -> None:
    """Print a comparison: ratios or differences, warnings, what became worse."""
    output.print(comparison.table)
    for warning in comparison.warnings:
        output.print(f"warning: {warning}", style="yellow", markup=False)
    for regression in comparison.regressions:
        output.print(f"regression: {regression}", style="red", markup=False)
    if not comparison.regressions and comparison.judged:
        output.print("no regression beyond the noise", markup=False)


if __name__ == "__main__":
    run_command(main)
