"""The tables of measured figures in README.md and docs/, written from committed results.

A block begins with a comment that names its form and its result:

    <!-- latency: benchmarks/results/latency-.../latency.json -->
    ...
    <!-- end -->

What stands between is replaced. A form is a kind of result, or ``goals`` or ``profile`` for one
table of it. A test compares the files with what their results give.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.report.columns import interval, of, tabulate
from benchmarks.report.result import (
    COMPUTE,
    END_TO_END,
    Case,
    Result,
    Row,
    digits,
    read_result,
    roofline_distance,
    rows_of,
)
from benchmarks.report.tables import tables_of
from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import write_text
from efficientface_deploy.workbench.tables import Table

_BLOCK = re.compile(
    r"^(?P<head><!-- (?P<form>[a-z]+): (?P<path>\S+) -->)\n(?P<body>.*?)^(?P<end><!-- end -->)$",
    re.MULTILINE | re.DOTALL,
)
_HEAD = re.compile(r"^<!-- [a-z]+: \S+ -->$", re.MULTILINE)
_BACKENDS = {"torch": "PyTorch", "onnx": "ONNX", "trt": "TensorRT", "trt-rtx": "TensorRT for RTX"}


def documents(root: Path = ROOT) -> list[Path]:
    """The files that may have such blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def update_docs(root: Path = ROOT) -> dict[Path, bool]:
    """Write the tables anew, each file atomically.

    Returns:
        Whether each file that has such blocks changed.

    Raises:
        ArtifactError: A block has no end, or its result cannot be read or is of another kind.
    """
    changed = {}
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        written = render(text, path, root)
        if _HEAD.search(text):
            changed[path] = written != text
        if written != text:
            write_text(path, written)
    return changed


def render(text: str, path: Path, root: Path = ROOT) -> str:
    """A file's text with its tables written anew.

    Args:
        text: As it is.
        path: Its name, for errors.
        root: What the results' paths are relative to.

    Raises:
        ArtifactError: As :func:`update_docs`.
    """
    if len(_HEAD.findall(text)) != len(_BLOCK.findall(text)):
        expected = "<!-- end --> after each <!-- kind: result -->"
        raise ArtifactError(path, expected, "a block without its end", "add the line")

    def write(block: re.Match[str]) -> str:
        table = _table(block["form"], root / block["path"])
        return f"{block['head']}\n\n{table.to_markdown()}\n{block['end']}"

    return _BLOCK.sub(write, text)


def _table(form: str, path: Path) -> Table:
    result = read_result(path)
    if form in _PARTS:
        found = [table for table in tables_of(result) if table.title == _PARTS[form]]
        if not found:
            raise ArtifactError(path, f"a result with {form}", "none", "name another result")
        return dataclasses.replace(found[0], title="", notes=())
    if result["kind"] != form:
        expected = f"a result of kind {form}, as the comment says"
        raise ArtifactError(path, expected, result["kind"], "name a result of that kind")
    if form in _SUMMARIES:
        return _SUMMARIES[form](result)
    return dataclasses.replace(tables_of(result)[0], title="", notes=())


def latency_summary(result: Result) -> Table:
    """One row per model and threads: batch 1, the largest batch's throughput, end to end, start."""
    cases = result["cases"]
    largest = max(case["batch"] for case in cases)
    cold = {(row["model"], row["backend"], row["threads"]): row for row in result.get("cold") or []}
    found: dict[tuple[Any, ...], dict[tuple[str, int], Case]] = {}
    for case in cases:
        key = case["model"], case["backend"], case.get("threads")
        found.setdefault(key, {})[case["stage"], case["batch"]] = case
    models = {(_name(case), case["model"]) for case in cases}
    names = [name for name, _ in models]
    rows = []
    for key, own in sorted(found.items(), key=lambda item: item[0][2] or 0):
        if (COMPUTE, 1) in own:
            first = own[COMPUTE, 1]
            name = _name(first)
            row = {**first, "name": name if names.count(name) == 1 else first["model"]}
            row["throughput"] = own.get((COMPUTE, largest), Case()).get("images_per_second")
            row["label_ms"] = own.get((END_TO_END, 1), Case()).get("p50_ms")
            rows.append({**row, "start_ms": cold.get(key, {}).get("p50_ms")})
    columns = {
        "": of("name"),
        ">threads": lambda row: "-" if row.get("threads") is None else str(row["threads"]),
        ">batch 1, p50": _with_speedup,
        ">p90": of("p90_ms", digits),
        ">p99": of("p99_ms", digits),
        f">images/s at batch {largest}": of("throughput", digits),
        ">JPEG to label, p50": of("label_ms", digits),
        ">x roofline": lambda row: digits(roofline_distance(row)),
        ">cold start": of("start_ms", digits),
    }
    return tabulate("", columns, rows)


def peers_summary(result: Result) -> Table:
    """One row per network and toolchain that is ranked: its time by ours, for each kind of work."""
    found: dict[tuple[str, str], dict[tuple[int, int], Row]] = {}
    for row in rows_of(result):
        if row.get("ranked") and not row.get("is_ours"):
            own = found.setdefault((row["model"], row["backend"]), {})
            own[row["batch"], row["threads"]] = row["ours_faster"]
    works = sorted({work for own in found.values() for work in own})
    columns: dict[str, Callable[[Any], str]] = {"network": of("network"), "with": of("toolchain")}
    for batch, threads in works:
        name = f">{_count(batch, 'picture')}, {_count(threads, 'thread')}"
        columns[name] = of(f"{batch} {threads}", interval)
    rows = [
        {
            "network": network,
            "toolchain": toolchain,
            **{f"{batch} {threads}": ratio for (batch, threads), ratio in own.items()},
        }
        for (network, toolchain), own in found.items()
    ]
    return tabulate("", columns, rows)


_PARTS = {"goals": "Goals", "profile": "Profile by kind of operator"}  # titles
_SUMMARIES = {"latency": latency_summary, "peers": peers_summary}


def _name(row: Any) -> str:
    """``ONNX INT8``, ``PyTorch``, ``ONNX FP16 (cuda)``."""
    family, _, device = row["backend"].partition(":")
    name = _BACKENDS.get(family, family)
    if family != "torch" and row.get("precision"):
        name += f" {row['precision'].upper()}"
    return name if device in ("", "cpu") else f"{name} ({device})"


def _with_speedup(case: Case) -> str:
    gain, text = case.get("speedup"), digits(case["p50_ms"])
    return text if gain is None or gain["value"] == 1 else f"{text} ({gain['value']:.1f}x)"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
