"""Results as tables, and as Markdown with plots; two results compared; the figures of the docs.

``python -m benchmarks.report RESULT.json`` shows one; with ``--out`` it writes ``report.md`` and
the plots as PNG. ``--compare OLD.json`` prints ratios and names what became slower beyond the
noise. ``--docs`` writes the tables of README.md and docs/ from the results that they name.
"""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.report.__main__", "bench")

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.compare import TOLERANCE, compare
from benchmarks.report.docs import update_docs
from benchmarks.report.publish import (
    console,
    require_libraries,
    show,
    show_comparison,
    write_report,
)
from benchmarks.report.result import Result, damage_named, read_result
from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import check_writable


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Options of ``python -m benchmarks.report``."""

    results: tuple[Path, ...] = option(
        (),
        positional=True,
        metavar="RESULT",
        help="results, the newest where --compare",
        first=True,
    )
    out: Path | None = option(
        None, help="write report.md and the plots there", metavar="DIR", first=True
    )
    compare: Path | None = option(
        None, help="an older result of the same kind", metavar="OLD", first=True
    )
    tolerance: float = option(
        TOLERANCE, metavar="SHARE", minimum=0, help="what two runs may differ by as noise"
    )
    fail_on_regression: bool = option(False, help="with --compare: exit 1 where one is found")
    docs: bool = option(False, help="write the tables of README.md and docs/ from their results")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.report``."""
    config = parse_config(
        ReportConfig,
        argv,
        prog="python -m benchmarks.report",
        description=__doc__ or "",
        example="new/latency.json --compare old/latency.json",
    )
    require_libraries()
    check_writable(config.out)
    output = console()
    if config.docs:
        for path, changed in update_docs().items():
            state = "rewritten" if changed else "is up to date"
            output.print(f"{path.name} {state}", markup=False)
    results = [read_result(path) for path in config.results]
    _check(config, results)
    comparison = None
    if config.compare is not None:
        strict = config.fail_on_regression
        comparison = compare(config.compare, config.results[0], config.tolerance, strict=strict)
    with damage_named(*config.results):
        if config.out is not None and results:
            write_report(results, comparison, config.out)
            output.print(f"wrote report.md and its plots to {config.out}", markup=False)
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
    if not results and not config.docs:
        raise ConfigError("RESULT", "a result", "none", "give latency.json or another result")
    if config.compare is not None and len(results) != 1:
        expected = "one result to compare with it"
        raise ConfigError("--compare", expected, str(len(results)), "give the newer result alone")
    if config.fail_on_regression and config.compare is None:
        fix = "give the older result with --compare"
        raise ConfigError("--fail-on-regression", "--compare OLD", "nothing to compare with", fix)
