"""Tables of every kind of result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.report.kinds import PROFILE, TABLES, tables_of
from benchmarks.report.result import read_result
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
        "Not measured here",
    ]
    assert cells(table(full_latency, "Goals")) == ["x roofline at most", "1.5", "1.4", "yes"]
    assert "2.00" in cells(table(full_latency, "Latency"))  # x roofline
    assert cells(table(full_latency, "Cold"))[-1] == "88"  # MiB
    assert "12.3" in cells(table(full_latency, "Latency"))  # mJ an image
    peak = cells(table(full_latency, "The machine"))
    assert peak[:6] == ["1", "fp32", "80.0", "torch", "numpy 60.0, torch 80.0", "20.0"]
    assert "12.0 M, 20.0" in cells(PROFILE.fill(full_latency))[1]  # in brackets: M, and a ns


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
    found = PROFILE.fill(full_latency)
    assert len(found.columns) == 3
    rows = {str(row[0]): list(row[1:]) for row in found.rows}
    assert list(rows) == ["the rest", "pointwise convolutions", "all"]
    assert rows["pointwise convolutions"][0] == "" and rows["all"] == ["50", "1,000"]


def test_goals_may_have_intervals(latency: dict[str, Any]) -> None:
    reached = {"value": 1.25, "low": 1.2, "high": 1.3}
    latency["goals"] = [{"goal": "faster", "wanted": 1.2, "reached": reached, "met": None}]
    shown = table(latency, "Goals")
    assert shown.columns == ["goal", ">wanted", ">reached"]
    assert cells(shown) == ["faster", "1.2", "1.25 (1.20 to 1.30)"]


def test_recall_of_each_class_is_a_column(accuracy: dict[str, Any]) -> None:
    accuracy["data"]["labels"] = ["Neutral", "Anger"]
    accuracy["rows"][0]["recall"] = [0.5, None]
    shown = table(accuracy, "Recall")
    assert shown.columns == ["Model", "Backend", ">Neutral"]
    assert cells(shown) == ["a.onnx", "onnx:cpu", "50.0"]


def test_a_part_of_runtime_shows_its_figures() -> None:
    found = {one.title: one for one in tables_of(read_result(_committed("runtime")))}
    assert list(found) == [
        *("Goals", "Start", "Calls", "Pictures", "Batches", "Memory"),
    ]
    assert found["Memory"].rows == [["0.1262", "84856", "84868", "160"]]
    assert [row[0] for row in found["Pictures"].rows] == ["decode", "resize", "infer", "whole"]


def test_figures_are_those_of_the_result() -> None:
    goals, calls, settings = tables_of(read_result(_committed("peers")))
    assert goals.rows[0][:4] == [
        *("faster than the best peer on the same network", "1.2", "1.26 (1.09 to 1.60)", "yes")
    ]
    assert [row[0] for row in calls.rows if len(row) == 1] == [
        *("compute, batch 1", "compute, batch 32")
    ]
    assert calls.rows[1][:5] == ["EfficientFace", "EfficientFace Deploy", "fp32", "1", "4.72"]
    assert "our graph" in [name for name, _ in settings.rows]


def test_every_kind_has_a_committed_result() -> None:
    assert {read_result(path)["kind"] for path in RESULTS.glob("*/*.json")} == set(TABLES)


def _committed(kind: str) -> Path:
    (path,) = RESULTS.glob(f"{kind}-*/{kind}.json")
    return path


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: path.parent.name
)
def test_every_committed_result_has_tables(path: Any) -> None:
    found = tables_of(read_result(path))
    assert found
    for one in found:
        assert one.to_markdown().count("\n") > 2
        assert all(len(row) in (1, len(one.columns)) for row in one.rows)


def test_an_environment_says_what_each_file_answered_and_which_are_refused() -> None:
    figures = {"agreement": 0.975, "max_difference": 0.3, "same_file_difference": 0.1234}
    files = [
        {"file": "efficientface-int8-gpu.onnx", "refused": "a probe's error", **figures},
        {"file": "efficientface-fp32-cpu.onnx", "refused": None, **figures, "agreement": 1.0},
        {"file": "efficientface-fp16-cpu.onnx", "refused": "no library"},
    ]
    head = {"why": "old", "python": "3.10.13", "packages": {"onnxruntime": "1.18.0"}}
    counts = {"passed": 9, "failed": 1, "skipped": 3, "failures": ["a::b"]}
    rows = [{**head, "files": files, **counts}, {**head, "why": "untried", "files": files}]
    result = {"kind": "versions", "images": "2 faces", "rows": rows, "absent": [], "goals": []}
    found = table(result, "Versions")
    row = dict(zip(found.columns, found.rows[0], strict=True))
    assert row["int8-gpu"] == "refused (97.5 %, 0.1)"
    assert (row["fp32-cpu"], row["fp16-cpu"]) == ("100.0 %, 0.1", "refused")
    assert (row["ONNX Runtime"], row["Tests passed"]) == ("1.18.0", "9 of 10")
    assert cells(found).count("not run") == 1
    assert cells(table(result, "Tests that failed")) == ["old", "a::b"]
    assert "no library" in cells(table(result, "Files refused"))


def test_release_shows_each_python_beside_the_other_and_what_failed():
    good = {"packages": 8, "bytes": 294_000_000}
    lines = [
        {"line": "efficientface-predict a", "error": ""},
        {"line": "b", "error": "exit code 2"},
    ]
    rows = [
        {"extras": "", "python": "3.10.13", "lines": lines[:1], **good},
        {"extras": "cpu,x", "python": "3.13", "lines": [{"line": "pip install", "error": "no"}]},
        {"extras": "cpu,x", "python": "3.10.13", "lines": lines, **good},
    ]
    files = [{"name": "a.whl", "bytes": 1, "sha256": "00"}]
    result = {"kind": "release", "rows": rows, "files": files, "not_here": {"gpu": "no GPU"}}
    found = table({**result, "absent": [], "goals": []}, "Extras")
    bare, both, missing = (dict(zip(found.columns, row, strict=True)) for row in found.rows)
    assert (bare["Extras"], bare["Python 3.10"]) == ("none", "yes, 8 packages, 294 MB")
    assert both["Lines that were run"] == "`efficientface-predict a`<br>`b`"
    assert (both["Python 3.10"], both["Python 3.13"]) == ("`b`: exit code 2", "`pip install`: no")
    assert missing["Lines that were run"] == "not run: no GPU" and not missing["Python 3.10"]
