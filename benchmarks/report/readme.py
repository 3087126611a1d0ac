"""README's tables of measured figures, written from committed results.

A block in README.md begins with a comment that names its kind and its result:

    <!-- latency: benchmarks/results/latency-.../latency.json -->
    ...
    <!-- end -->

What stands between is replaced; a test compares README with what its results give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.measure.roofline import FORMATS
from benchmarks.report.result import (
    COMPUTE,
    END_TO_END,
    Case,
    Result,
    digits,
    floor_distance,
    read_result,
    rows_of,
)
from benchmarks.report.tables import Table
from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import write_text

README = ROOT / "README.md"

_BLOCK = re.compile(
    r"^(?P<head><!-- (?P<kind>[a-z]+): (?P<path>\S+) -->)\n(?P<body>.*?)^(?P<end><!-- end -->)$",
    re.MULTILINE | re.DOTALL,
)
_HEAD = re.compile(r"^<!-- [a-z]+: \S+ -->$", re.MULTILINE)
_BACKENDS = {"torch": "PyTorch", "onnx": "ONNX", "trt": "TensorRT", "trt-rtx": "TensorRT for RTX"}


def update_readme(path: Path = README, root: Path = ROOT) -> bool:
    """Write the tables anew, atomically.

    Returns:
        Whether anything changed.

    Raises:
        ArtifactError: A block has no end, or its result cannot be read or is of another kind.
    """
    text = path.read_text(encoding="utf-8")
    written = render_readme(text, root, path)
    if written != text:
        write_text(path, written)
    return written != text


def render_readme(text: str, root: Path = ROOT, path: Path = README) -> str:
    """README's text with its tables written anew.

    Args:
        text: As it is.
        root: What the results' paths are relative to.
        path: Its name, for errors.

    Raises:
        ArtifactError: As :func:`update_readme`.
    """
    if len(_HEAD.findall(text)) != len(_BLOCK.findall(text)):
        raise ArtifactError(
            path,
            "<!-- end --> after each <!-- kind: result -->",
            "a block without its end",
            "add the line",
        )

    def write(block: re.Match[str]) -> str:
        table = _table(block["kind"], read_result(root / block["path"]), root / block["path"])
        return f"{block['head']}\n\n{table.to_markdown()}\n{block['end']}"

    return _BLOCK.sub(write, text)


def _table(kind: str, result: Result, path: Path) -> Table:
    makers = {"latency": latency_summary, "accuracy": accuracy_summary, "export": export_summary}
    if kind not in makers or result["kind"] != kind:
        raise ArtifactError(
            path,
            f"a result of kind {kind}, as README says",
            str(result["kind"]),
            "name " + ", ".join(makers) + " and a result of that kind",
        )
    return makers[kind](result)


def latency_summary(result: Result) -> Table:
    """One row per model and threads: batch 1, the largest batch's throughput, end to end, start."""
    cases = rows_of(result)
    largest = max(case["batch"] for case in cases)
    cold = {(row["model"], row["backend"]): row for row in result.get("cold") or []}
    floors = any(case.get("floor") for case in cases)
    found: dict[tuple[Any, ...], dict[tuple[str, int], Case]] = {}
    for case in cases:
        key = case["model"], case["backend"], case.get("threads")
        found.setdefault(key, {})[case["stage"], case["batch"]] = case
    ambiguous = _ambiguous(cases)
    rows = []
    for (model, backend, threads), own in sorted(found.items(), key=lambda item: item[0][2] or 0):
        first = own.get((COMPUTE, 1))
        if first is None:
            continue
        name = model if _name(first) in ambiguous else _name(first)
        row = [name, "-" if threads is None else str(threads), _with_speedup(first)]
        row += [digits(first.get(f"{percentile}_ms")) for percentile in ("p90", "p99")]
        row.append(digits((own.get((COMPUTE, largest)) or {}).get("images_per_second")))
        row.append(digits((own.get((END_TO_END, 1)) or {}).get("p50_ms")))
        if floors:
            row.append(digits(floor_distance(first)))
        if cold:
            start = cold.get((model, backend))
            row.append(digits(start["p50_ms"]) if start and start["threads"] == threads else "")
        rows.append(row)
    columns = ["", ">threads", ">batch 1, p50", ">p90", ">p99", f">images/s at batch {largest}"]
    columns += [">JPEG to label, p50", *([">x floor"] if floors else [])]
    columns += [">cold start"] if cold else []
    return Table("", columns, [("", rows)])


def accuracy_summary(result: Result) -> Table:
    """One row per model and backend."""
    rows = [
        [
            _name(row),
            _share(row["accuracy"], row.get("accuracy_interval")),
            f"{100 * row['macro_f1']:.2f} %",
            f"{100 * row['ece']:.2f} %",
            _share(row["agreement"], row.get("agreement_interval")),
        ]
        for row in rows_of(result)
    ]
    columns = ["", ">accuracy", ">macro-F1", ">ECE", f">same label as {result['reference']}"]
    return Table("", columns, [("", rows)])


def export_summary(result: Result) -> Table:
    """One row per exported file; an engine that could not run here says so."""

    def order(entry: Mapping[str, Any]) -> tuple[bool, int]:
        precision = entry.get("precision")
        rank = FORMATS.index(precision) if precision in FORMATS else len(FORMATS)
        return not entry["file"].endswith(".onnx"), rank

    rows = []
    for entry in sorted(rows_of(result), key=order):
        check = entry.get("verification") or {}
        row = [f"`{entry['file']}`", f"{entry['bytes'] / 1e6:.2f}", _arithmetic(entry)]
        if check.get("agreement") is None:
            rows.append([*row, "not run here", "", ""])
            continue
        row.append(_share(check["agreement"], check["agreement_interval"]))
        low, high = check["accuracy_interval"]
        difference = f"{100 * check['accuracy_difference']:+.2f}"
        row.append(f"{difference} [{100 * low:+.2f}, {100 * high:+.2f}]")
        rows.append([*row, f"{check['kl']:.1e}"])
    columns = ["file", ">MB", "arithmetic (convolutions)", ">same label"]
    columns += [">accuracy minus PyTorch's, points", ">mean KL"]
    return Table("", columns, [("", rows)])


def _arithmetic(entry: Mapping[str, Any]) -> str:
    """``24 fp32 + 102 int8``; an engine's kernels, which its notes count."""
    text = str(entry.get("arithmetic") or "").partition(" convolutions")[0]
    kernels = re.search(r"\b\d+ kernels\b", " ".join(map(str, entry.get("notes") or [])))
    return f"{text}, {kernels[0]}" if kernels else text


def _name(case: Mapping[str, Any]) -> str:
    """``ONNX INT8``, ``PyTorch``, ``ONNX FP16 (cuda)``."""
    family, _, device = case["backend"].partition(":")
    name = _BACKENDS.get(family, family)
    if family != "torch" and case.get("precision"):
        name += f" {case['precision'].upper()}"
    return name if device in ("", "cpu") else f"{name} ({device})"


def _ambiguous(cases: Sequence[Case]) -> set[str]:
    """Names that more than one model would have."""
    models: dict[str, set[str]] = {}
    for case in cases:
        models.setdefault(_name(case), set()).add(case["model"])
    return {name for name, own in models.items() if len(own) > 1}


def _with_speedup(case: Case) -> str:
    gain = case.get("speedup")
    text = digits(case["p50_ms"])
    return text if gain is None or gain["value"] == 1 else f"{text} ({gain['value']:.1f}x)"


def _share(value: float, interval: Any) -> str:
    text = f"{100 * value:.2f} %"
    return text if not interval else f"{text} [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"
