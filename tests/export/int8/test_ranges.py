"""Ranges of tensors: the largest, and what percentile and entropy make of a distribution."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from efficientface_deploy.errors import BackendError, ExportError
from efficientface_export.int8 import ranges
from efficientface_export.int8.ranges import activation_amax, tensor_ranges


def pass_through(weight: float = 1.0) -> onnx.ModelProto:
    """``output = input * weight``, by way of a tensor ``inner``."""
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 100])
        for name in ("input", "output")
    ]
    nodes = [
        helper.make_node("Mul", ["input", "weight"], ["inner"]),
        helper.make_node("Identity", ["inner"], ["output"]),
    ]
    weights = [numpy_helper.from_array(np.float32(weight), "weight")]
    graph = helper.make_graph(nodes, "test", value[:1], value[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def amax_of(values: np.ndarray, method: str) -> float:
    """Limit of the tensor ``inner``, through which the values pass."""
    largest = {"inner": tensor_ranges(pass_through(), values)["inner"]}
    return activation_amax(pass_through(), largest, values, method)["inner"]


def normal(count: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 100)).astype(np.float32)


def test_ranges_are_of_all_batches_and_of_the_weights() -> None:
    values = np.zeros((50, 100), dtype=np.float32)
    values[40, 7] = -3
    found = tensor_ranges(pass_through(weight=-2.5), values)
    assert found == {"weight": 2.5, "input": 3.0, "inner": 7.5, "output": 7.5}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_the_largest(bad: float) -> None:
    values = np.zeros((40, 100), dtype=np.float32)
    values[3, 7] = bad
    assert tensor_ranges(pass_through(), values)["inner"] == np.inf


def test_every_tensor_of_the_network_is_measured(
    graph: onnx.ModelProto, images: np.ndarray
) -> None:
    found = tensor_ranges(graph, images[:4])
    convolutions = [node for node in graph.graph.node if node.op_type in ("Conv", "Gemm")]
    for node in convolutions:
        assert {node.output[0], *node.input} <= set(found)
    assert images[:4].max() in found.values()  # the picture after its cast


def test_minmax_takes_the_largest_magnitude() -> None:
    values = normal()
    assert amax_of(values, "minmax") == float(np.abs(values).max())


def test_percentile() -> None:
    values = normal()
    values[0, 0] = 50
    limit = amax_of(values, "percentile")
    assert limit == pytest.approx(np.percentile(np.abs(values), 99.999), abs=50 / ranges.BINS)


def test_entropy_clips_a_tail_and_keeps_a_box() -> None:
    tail = normal(2000)
    tail[0, :5] = 60
    clipped = amax_of(tail, "entropy")
    assert 3 < clipped < 12
    box = np.random.default_rng(0).uniform(-1, 1, (2000, 100)).astype(np.float32)
    assert amax_of(box, "entropy") > 0.97


def test_zeros_do_not_count_for_entropy() -> None:
    """A ReLU makes half of the values zero; that says nothing about the scale."""
    values = np.abs(normal(2000))
    with_zeros = np.concatenate([values, np.zeros_like(values), np.zeros_like(values)])
    amax = [amax_of(part, "entropy") for part in (values, with_zeros)]
    assert amax[0] == pytest.approx(amax[1], rel=0.02)


def test_methods_differ_on_a_network(graph: onnx.ModelProto, images: np.ndarray) -> None:
    """With 128 bins, as ONNX Runtime's default has it, entropy would equal minmax."""
    names = [node.input[0] for node in graph.graph.node if node.op_type == "Conv"]
    ranges = tensor_ranges(graph, images)
    largest = {name: ranges[name] for name in names}
    found = {
        method: activation_amax(graph, largest, images, method)
        for method in ("minmax", "percentile", "entropy")
    }
    for name in largest:
        assert 0 < found["entropy"][name] <= found["minmax"][name] * 1.000001
        assert 0 < found["percentile"][name] <= found["minmax"][name] * 1.000001
    for method in ("percentile", "entropy"):
        smaller = [found[method][name] < 0.99 * found["minmax"][name] for name in largest]
        assert np.mean(smaller) > 0.1
    assert found["entropy"] != found["percentile"]


def test_with_128_bins_entropy_would_be_minmax(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = normal()
    tail[0, :5] = 60
    monkeypatch.setattr(ranges, "BINS", 128)
    assert amax_of(tail, "entropy") == 60


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_dead_tensor(method: str) -> None:
    values = np.zeros((4, 100), dtype=np.float32)
    assert amax_of(values, method) == 0


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_a_network_that_overflows_has_no_amax(method: str) -> None:
    values = normal(20)
    values[3, 7] = np.nan
    with pytest.raises(ExportError, match="found NaN or infinity in inner"):
        amax_of(values, method)


def test_activations_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's calibrators keep all of them: gigabytes for 500 images at 224 pixels."""
    alive: list[int] = []
    run = ranges.run_tensors

    def counted(*arguments: object) -> object:
        for values in run(*arguments):  # type: ignore[arg-type]
            alive.append(len(next(iter(values.values()))))
            yield values

    monkeypatch.setattr(ranges, "run_tensors", counted)
    amax_of(normal(100), "entropy")
    assert max(alive) <= 16
    assert sum(alive) == 200  # once for the range, once for the histogram


def test_missing_runtime(graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime, .*not installed.*\[cpu\]"):
        tensor_ranges(graph, np.zeros((1, 64, 64, 3), dtype=np.uint8))
