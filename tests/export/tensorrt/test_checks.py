"""What was parsed and built, held against the graph."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from efficientface_deploy.errors import ExportError
from efficientface_deploy.spec import ModelSpec
from efficientface_export.tensorrt.build_log import Layer
from efficientface_export.tensorrt.checks import check_log, check_network
from tests.export.tensorrt.test_builder import make_graph


def refused_unless(accepted: bool, precision: str) -> contextlib.AbstractContextManager[object]:
    if accepted:
        return contextlib.nullcontext()
    return pytest.raises(ExportError, match=f"3 {precision} convolutions")


@pytest.mark.parametrize(
    ("precision", "parsed", "accepted"),
    [
        ("fp16", {"fp16": 3}, True),
        ("fp16", {"fp16": 2}, False),
        ("fp16", {"fp32": 3}, True),  # a library that infers no type before the build
        ("fp16", {"fp32": 2}, False),
        ("fp16", {"fp16": 2, "fp32": 1}, False),
        ("fp16", {"fp16": 3, "fp32": 1}, False),
        ("fp32", {"fp16": 3}, False),
        ("fp32", {"int8": 3}, False),
        ("int8", {"int8": 3}, True),
        ("int8", {"int8": 2, "fp32": 1}, False),
        ("int8", {}, False),
    ],
)
def test_network_is_the_graphs(
    spec: ModelSpec, precision: str, parsed: dict[str, int], accepted: bool
) -> None:
    with refused_unless(accepted, precision):
        found = check_network(make_graph(spec, precision), parsed, Path("m.onnx"))
        assert found == {precision: 3}


def layers_of(**counts: int) -> list[Layer]:
    precisions = {"unknown": ""}
    return [
        Layer("c", "correlation", precisions.get(name, name))
        for name, n in counts.items()
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    ("precision", "listed", "accepted"),
    [
        ("fp16", {"fp16": 3}, True),
        ("fp16", {"fp16": 2}, True),  # two merged
        ("fp16", {}, True),  # no listing
        ("fp16", {"unknown": 3}, True),  # a dynamic batch
        ("int8", {"int8": 1, "unknown": 2}, True),
        ("fp16", {"fp32": 3}, False),
        ("fp16", {"fp16": 3, "fp32": 1}, False),
        ("fp16", {"fp32": 1, "unknown": 2}, False),
        ("int8", {"fp16": 3}, False),
    ],
)
def test_log_may_be_silent_but_not_contradict(
    spec: ModelSpec, precision: str, listed: dict[str, int], accepted: bool
) -> None:
    with refused_unless(accepted, precision):
        seen = check_log(make_graph(spec, precision), layers_of(**listed), Path("m.onnx"))
        assert seen == {name: n for name, n in listed.items() if name != "unknown"}


def test_log_with_too_many_in_a_precision_that_a_few_have(spec: ModelSpec) -> None:
    """INT8 that became FP32 where one layer was left out of INT8 on purpose."""
    graph = make_graph(spec, "int8")
    node = next(node for node in graph.graph.node if node.op_type == "Conv")
    node.input[:2] = ["x", "w1"]
    check_log(graph, layers_of(int8=2, fp32=1), Path("m.onnx"))
    with pytest.raises(ExportError, match=r"1 fp32 \+ 2 int8 convolutions.* found 3 fp32 in"):
        check_log(graph, layers_of(fp32=3), Path("m.onnx"))
