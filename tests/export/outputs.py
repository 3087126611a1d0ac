"""What the tests of whole exports ask of an output folder and of a command's output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efficientface_export.graph.io import read_onnx

Run = Callable[..., tuple[int, str, str]]
FP32, FP16, INT8 = (f"efficientface-{name}-cpu.onnx" for name in ("fp32", "fp16", "int8"))


def names(folder: Path) -> set[str]:
    """Everything in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}


def report(folder: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / "report.json").read_text())
    return {row["file"]: row for row in content["artifacts"]}


def one_line(error: str) -> str:
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def convolutions(folder: Path) -> list[str]:
    """Names of those of the FP32 file."""
    return [node.name for node in read_onnx(folder / FP32)[0].graph.node if node.op_type == "Conv"]
