"""What was built, held against the graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientface_deploy.errors import ExportError
from efficientface_deploy.spec import ModelSpec
from efficientface_export.tensorrt.build_log import Layer
from efficientface_export.tensorrt.checks import check_precisions
from tests.export.tensorrt.test_builder import make_graph


def layers_of(**counts: int) -> list[Layer]:
    return [Layer("c", "correlation", name) for name, n in counts.items() for _ in range(n)]


@pytest.mark.parametrize(
    ("precision", "built", "accepted"),
    [
        ("fp16", {"fp16": 3}, True),
        ("fp16", {"fp16": 2}, True),  # two merged
        ("fp16", {"fp16": 1}, False),
        ("fp16", {"fp32": 3}, False),
        ("fp16", {"fp16": 3, "fp32": 1}, False),
        ("int8", {"fp16": 3}, False),
        ("int8", {}, False),
    ],
)
def test_check_against_the_graph(
    spec: ModelSpec, precision: str, built: dict[str, int], accepted: bool
) -> None:
    def check() -> dict[str, int]:
        return check_precisions(
            make_graph(spec, precision), layers_of(**built), "trt-rtx", Path("m.onnx")
        )

    if accepted:
        assert check() == built
    else:
        with pytest.raises(ExportError, match=f"3 {precision} convolutions"):
            check()
