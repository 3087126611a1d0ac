"""Tables of every kind of result."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.report.result import read_result
from benchmarks.report.tables import profile_table, tables_of
from efficientface_deploy.workbench.tables import Table

RESULTS = ROOT / "benchmarks" / "results"


def table(result: dict[str, Any], title: str) -> Table:
    (found,) = [one for one in tables_of(result) if one.title.startswith(title)]
    return found


def cells(found: Table) -> list[str]:
    return [str(cell) for row in found.rows if len(row) == len(found.columns) for cell in row]


def test_a_full_result_has_every_table_and_the_goals_first(full_latency: dict[str, Any]) -> None:
    titles = [found.title for found in tables_of(full_latency)]
    assert titles == [
        "Goals",
        "Latency, milliseconds a call",
        "Cold start, milliseconds",
        "Files",
        "The machine's peak, measured in the same run",
        "Profile by kind of operator",
        "Profile: the 12 layers that take longest",
        "Engines' layers, by TensorRT's inspector",
        "Not measured here",
    ]
    assert cells(table(full_latency, "Goals")) == ["x roofline at most", "1.5", "1.4", "yes"]
    assert "2.00" in cells(table(full_latency, "Latency"))  # x roofline
    assert cells(table(full_latency, "Cold"))[-1] == "88"  # MiB
    assert cells(table(full_latency, "Engines")) == ["Convolution", "3"]
    assert "12.3" in cells(table(full_latency, "Latency"))  # mJ an image
    peak = cells(table(full_latency, "The machine"))
    assert peak[:6] == ["1", "fp32", "80.0", "torch", "numpy 60.0, torch 80.0", "20.0"]
    assert "12.0 M, 20.0" in cells(profile_table(full_latency))[1]  # in brackets: M, and a ns


def test_what_an_older_result_lacks_makes_no_empty_column(latency: dict[str, Any]) -> None:
    shown = table(latency, "Latency").columns
    assert ">p95" not in shown and ">x roofline" not in shown and ">p99" in shown
    latency["cases"][0]["p95_ms"] = 1.5
    assert ">p95" in table(latency, "Latency").columns


def test_kinds_of_several_models_stand_side_by_side(full_latency: dict[str, Any]) -> None:
    first = full_latency["profiles"][0]
    rest = {"kind": "the rest", "us": 50, "share": 1.0, "nodes": 1, "multiply_adds": 0}
    full_latency["profiles"].insert(
        0, {**first, "model": "b.onnx", "kinds": [rest], "total_us": 50}
    )
    found = profile_table(full_latency)
    assert len(found.columns) == 3
    rows = {str(row[0]): list(row[1:]) for row in found.rows}
    assert list(rows) == ["pointwise convolutions", "the rest", "all"]
    assert rows["pointwise convolutions"][0] == "" and rows["all"] == ["50", "1,000"]


def test_goals_may_have_intervals(latency: dict[str, Any]) -> None:
    reached = {"value": 1.25, "low": 1.2, "high": 1.3}
    latency["goals"] = [{"goal": "faster", "wanted": 1.2, "reached": reached, "met": None}]
    shown = table(latency, "Goals")
    assert shown.columns == ["goal", ">wanted", "reached"]
    assert cells(shown) == ["faster", "1.2", "1.25 (1.2 to 1.3)"]


def test_an_unknown_kind_shows_its_single_values(latency: dict[str, Any]) -> None:
    result = {key: latency[key] for key in ("schema", "machine", "software", "git", "config")}
    result |= {"kind": "something else", "absent": [], "warnings": [], "nothing": [], "text": "x"}
    result["calls"] = [{"step": "import", "ms": 1.25, "runs": [1, 2]}, {"step": "load", "ms": None}]
    result["start"] = {"ours": {"ms": 3, "deep": {"a": 1}}, "bare": {"ms": 2}, "ratio": 1.5}
    found = tables_of(result)
    assert [one.title for one in found] == ["calls", "start"]
    assert found[0].columns == ["step", ">ms"]
    assert cells(found[0]) == ["import", "1.25", "load", ""]
    assert found[1].columns == ["part", ">ms", ">ratio"]
    assert cells(found[1]) == ["ours", "3", "", "bare", "2", "", "all", "", "1.5"]


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: path.parent.name
)
def test_every_committed_result_has_tables(path: Any) -> None:
    found = tables_of(read_result(path))
    assert found
    for one in found:
        assert one.to_markdown().count("\n") > 2
