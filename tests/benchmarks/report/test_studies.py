from __future__ import annotations

import pytest

from benchmarks.report.result import read_result
from benchmarks.report.studies import NOISY, STUDIES, graphs_tables
from benchmarks.report.tables import tables_of
from efficientface_deploy.workbench.environment import ROOT

COMMITTED = sorted(
    path
    for kind in STUDIES
    for path in (ROOT / "benchmarks" / "results").glob(f"{kind}-*/{kind}.json")
)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_have_tables_without_gaps(path):
    result = read_result(path)
    for table in STUDIES[result["kind"]](result):
        assert table.rows
        assert all(len(row) in (1, len(table.columns)) for row in table.rows)
        assert table.to_markdown()


def test_every_kind_has_a_committed_result():
    assert {path.stem for path in COMMITTED} == set(STUDIES)


def test_a_noisy_run_says_so_beside_its_figures():
    result = read_result(next(path for path in COMMITTED if path.stem == "graphs"))
    for noisy in (True, False):
        for row in result["graphs"]:
            row["busy"] = noisy
        assert (NOISY in graphs_tables(result)[0].notes) is noisy


def test_figures_are_those_of_the_result():
    path = ROOT / "benchmarks/results/peers-2026-11-26-intel-xeon-2cpu/peers.json"
    goals, calls, settings = tables_of(read_result(path))
    assert goals.rows[0][:4] == [
        *("faster than the best peer on the same network", "1.2", "1.262 (1.091 to 1.601)", "yes")
    ]
    assert [row[0] for row in calls.rows if len(row) == 1] == [
        *("batch 1, 1 thread", "batch 1, 2 threads", "batch 32, 2 threads")
    ]
    assert calls.rows[2][:3] == ["EfficientFace", "**EfficientFace Deploy**", "4.72"]
    assert "our graph" in [name for name, _ in settings.rows]
    path = ROOT / "benchmarks/results/runtime-2026-11-26-intel-xeon-2cpu/runtime.json"
    memory = STUDIES["runtime"](read_result(path))[4]
    assert memory.rows == [["100000", "+0.430", "83.6", "83.6"]]
