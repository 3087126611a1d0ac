"""Where the time goes: nodes sorted into kinds, on real sessions and on recorded traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorrt_stand_in import VERSIONS, read_record

from benchmarks.latency import profile
from benchmarks.measure import profiling as module
from benchmarks.measure.models import Candidate, open_candidates
from benchmarks.measure.profiling import (
    by_kind,
    engine_layers,
    inspect_engine,
    kind_of,
    multiply_adds,
    profile_onnx,
    stored_weights,
    summarise,
    weight_shape,
)
from efficientface_deploy.errors import BackendError


def node(operator: str, inputs: list[list[int]], output: list[int]) -> dict[str, Any]:
    return {
        "op_name": operator,
        "input_type_shape": [{"float": shape} for shape in inputs],
        "output_type_shape": [{"float": output}],
    }


@pytest.mark.parametrize(
    ("operator", "picture", "weight", "kind"),
    [
        ("Conv", [1, 32, 24, 24], [64, 32, 1, 1], "pointwise convolutions"),
        ("FusedConv", [1, 32, 24, 24], [32, 1, 3, 3], "depthwise convolutions"),
        ("Conv", [1, 3, 96, 96], [32, 3, 3, 3], "dense convolutions"),
        ("Conv", [1, 32, 24, 24], [32, 8, 3, 3], "grouped convolutions"),
        # Channels last, as ONNX Runtime keeps them between quantised convolutions.
        ("QLinearConv", [1, 12, 12, 64], [16, 64, 1, 1], "pointwise convolutions"),
        ("QLinearConv", [1, 12, 12, 64], [64, 1, 3, 3], "depthwise convolutions"),
        ("QLinearConv", [1, 64, 12, 12], [64, 1, 3, 3], "depthwise convolutions"),
        ("QLinearConv", [1, 6, 6, 12], [12, 12, 3, 3], "dense convolutions"),
    ],
)
def test_kinds_of_convolutions(
    operator: str, picture: list[int], weight: list[int], kind: str
) -> None:
    assert kind_of(node(operator, [picture, weight], picture), weight) == kind


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("Concat", "Concat, Slice, Split, Reshape"),
        ("ReorderInput", "changes of memory layout"),
        ("Cast", "Transpose and Cast"),
        ("DequantizeLinear", "Quantize and Dequantize"),
        ("Softmax", "the rest"),
        ("Something", "the rest"),
    ],
)
def test_kinds_of_other_nodes(operator: str, kind: str) -> None:
    assert kind_of(node(operator, [[1, 2]], [1, 2]), None) == kind


def test_a_convolution_without_a_known_weight_says_so() -> None:
    assert kind_of(node("QLinearConv", [[1, 2, 3, 3]], [1, 2, 3, 3]), None).endswith("shape")


def test_multiply_adds_of_a_node_are_the_whole_batchs() -> None:
    one = node("Conv", [[2, 32, 24, 24], [64, 32, 1, 1]], [2, 64, 24, 24])
    assert multiply_adds(one, [64, 32, 1, 1]) == 2 * 64 * 32 * 24 * 24
    last = node("QLinearConv", [[1, 12, 12, 64]], [1, 12, 12, 16])
    assert multiply_adds(last, [16, 64, 1, 1]) == 16 * 64 * 12 * 12
    assert multiply_adds(node("Concat", [[1, 2]], [1, 4]), None) == 0


def test_a_packed_weight_is_looked_up_by_the_nodes_name() -> None:
    stored = {"stage2.1": [1, 1, 1, 1], "stage2.1.dw": [64, 1, 3, 3]}
    packed = node("QLinearConv", [[1, 12, 12, 64], [], [64]], [1, 12, 12, 64])
    assert weight_shape("stage2.1.dw_token_164", packed, stored) == [64, 1, 3, 3]
    assert weight_shape("other", packed, stored) is None
    traced = node("Conv", [[1, 2, 3, 3], [8, 2, 1, 1]], [1, 8, 3, 3])
    assert weight_shape("stage2.1.dw", traced, stored) == [8, 2, 1, 1]


def test_medians_leave_the_warm_up_out() -> None:
    def event(name: str, microseconds: float, operator: str = "Relu") -> dict[str, Any]:
        args = node(operator, [[1, 4]], [1, 4])
        return {"cat": "Node", "name": name + "_kernel_time", "dur": microseconds, "args": args}

    passes = [(100, 50), (100, 50), (3, 7), (5, 9), (4, 8)]
    trace = [{"cat": "Session", "name": "session_initialization", "dur": 10**6}]
    trace += [one for a, b in passes for one in (event("a", a), event("b_nchwc", b, "Concat"))]
    layers = summarise(trace, 2, {})
    assert [(layer["name"], layer["us"]) for layer in layers] == [("a", 4), ("b", 8)]
    rows = by_kind(layers)
    assert [(row["kind"], row["us"], row["nodes"]) for row in rows] == [
        ("Concat, Slice, Split, Reshape", 8, 1),
        ("the rest", 4, 1),
    ]
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_a_real_session_is_profiled_as_the_runtime_makes_it(
    model_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    import onnxruntime

    original = onnxruntime.SessionOptions
    images = [np.full((2, 64, 64, 3), value, np.uint8) for value in (1, 200)]
    with open_candidates([model_files["onnx"]], ("onnx:cpu",), (1,)) as (opened, _):
        found = profile_onnx(opened[0], images, 5)
    assert onnxruntime.SessionOptions is original
    assert list(tmp_path.iterdir()) == []  # the trace is gone
    kinds = {row["kind"]: row for row in found["kinds"]}
    assert {"pointwise convolutions", "depthwise convolutions"} <= set(kinds)
    assert found["total_us"] == pytest.approx(sum(row["us"] for row in found["kinds"]))
    assert (found["batch"], found["runs"], found["threads"]) == (2, 5, 1)
    times = [layer["us"] for layer in found["layers"]]
    assert times == sorted(times, reverse=True)
    # ONNX Runtime pads channels to whole blocks: no fewer multiply-adds than the file has.
    from efficientface_export.graph.io import multiply_adds as count

    import onnx  # isort: skip

    own = sum(row["multiply_adds"] for row in found["kinds"])
    assert own >= 2 * 0.99 * count(onnx.load(model_files["onnx"]))


def test_stored_weights_of_a_file(model_files: dict[str, Path]) -> None:
    shapes = stored_weights(model_files["onnx"])
    assert shapes and all(len(shape) == 4 for shape in shapes.values())


def test_a_checkpoint_has_no_profile_and_says_so(
    student: Path, make_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(entry: Candidate, *others: object) -> dict[str, Any]:
        raise RuntimeError("no trace")

    monkeypatch.setattr("benchmarks.latency.profile_onnx", broken)
    paths = [make_onnx("a.onnx"), student]
    with open_candidates(paths, ("onnx:cpu", "torch:cpu"), (1, 2)) as (opened, _):
        found, failed = profile(opened, seed=0)
    assert found == []
    assert sorted(entry.reason for entry in failed) == [
        "profile: RuntimeError: no trace",
        "profile: for onnx:cpu, onnx:cuda and engines",
    ]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (
            '{"Layers": [{"Name": "a", "LayerType": "Convolution"}, "b"]}',
            ["Convolution", "unknown"],
        ),
        ('{"Layers": []}', []),
        ("{}", []),
    ],
)
def test_layers_of_an_engine(text: str, layers: list[str]) -> None:
    assert [layer["kind"] for layer in engine_layers(text)] == layers


def engine_candidate(tmp_path: Path) -> Candidate:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    predictor = SimpleNamespace(path=path, backend="trt", provenance={"precision": "fp16"})
    return Candidate("model.engine", predictor, None)  # type: ignore[arg-type]


def fake_library(plan: object) -> SimpleNamespace:
    base = type("ILogger", (), {name: index for index, name in enumerate(SEVERITIES)})
    runtime = SimpleNamespace(
        deserialize_cuda_engine=lambda data: plan if data == b"plan" else None
    )
    return SimpleNamespace(
        __name__="tensorrt",
        ILogger=base,
        Runtime=lambda logger: runtime,
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )


SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


def test_an_engine_is_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"Layers": [{"Name": "a", "LayerType": "Convolution"}]})
    inspector = SimpleNamespace(get_engine_information=lambda kind: text if kind == "json" else "")
    plan = SimpleNamespace(create_engine_inspector=lambda: inspector)
    monkeypatch.setattr(module, "load_library", lambda kind: fake_library(plan))
    found = inspect_engine(engine_candidate(tmp_path))
    assert found["engine_layers"] == [{"name": "a", "kind": "Convolution"}]
    monkeypatch.setattr(module, "load_library", lambda kind: fake_library(None))
    with pytest.raises(BackendError, match="leave --profile out"):
        inspect_engine(engine_candidate(tmp_path))


@pytest.mark.parametrize(
    "name", [*(f"tensorrt-{version}" for version in VERSIONS), "tensorrt_rtx-1.7"]
)
def test_every_release_has_the_inspector(name: str) -> None:
    record = json.dumps(read_record(name))
    for call in ("create_engine_inspector", "get_engine_information", "LayerInformationFormat"):
        assert call in record
