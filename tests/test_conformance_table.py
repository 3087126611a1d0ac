"""The table says what was run, and never calls passed what was skipped."""

from __future__ import annotations

import types
from typing import Any

from tests.conformance_table import Outcomes, _plain


def report(test: str, backend: str, outcome: str, why: str = "", when: str = "call") -> Any:
    return types.SimpleNamespace(
        nodeid=f"a/test_x.py::test_{test}[{backend}]",
        when=when,
        outcome=outcome,
        passed=outcome == "passed",
        skipped=outcome == "skipped",
        longrepr=("file", 1, f"Skipped: {why}") if outcome == "skipped" else None,
    )


def test_cells_and_reasons() -> None:
    table = Outcomes()
    reports = [
        report("any_batch", "onnx", "passed"),
        report("any_batch", "onnx", "failed"),
        report("any_batch", "onnx", "passed", when="setup"),
        report("threads", "onnx", "skipped", "one case"),
        report("any_batch", "trt", "skipped", "no GPU | in /usr/lib/x", when="setup"),
        report("threads", "trt", "skipped", "no GPU", when="setup"),
        report("broken", "torch", "failed", when="setup"),
    ]
    nodes = {one.nodeid: one.nodeid.partition("[")[2].rstrip("]") for one in reports}
    items: Any = [
        types.SimpleNamespace(
            nodeid=node, callspec=types.SimpleNamespace(params={"subject": backend})
        )
        for node, backend in nodes.items()
    ]
    table.pytest_collection_modifyitems([*items, types.SimpleNamespace(nodeid="other")])
    for one in reports:
        table.pytest_runtest_logreport(one)
    table.pytest_runtest_logreport(report("other", "none", "passed"))
    lines = table.to_markdown("# Head").splitlines()
    assert lines[2:7] == [
        "| test | onnx | torch |",
        "|---|---|---|",
        "| any batch | passed 1, failed 1 | - |",
        "| threads | skipped 1 | - |",
        "| broken | - | failed 1 |",
    ]
    assert lines[-2:] == ["|---|---|", "| trt | no GPU / in x |"]


def test_reason_is_one_plain_line() -> None:
    assert _plain("a\n  b | /root/x/y.onnx: c") == "a b / y.onnx: c"
