"""Precision is what the graph says: FP16 tensors, Q/DQ pairs, and no silent FP32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from efficientface_export.graph import write_onnx
from efficientface_export.precision import (
    FP16_MARGIN,
    FP16_MAX,
    FP16_TINY,
    quantise,
    quantised_inputs,
    require_fp16_range,
    require_precision,
    summarise_precision,
    to_fp16,
)
from efficientface_export.ranges import activation_limits, tensor_ranges
from efficientface_export.source import open_source
from onnx import TensorProto, numpy_helper

from efficientface_deploy import load
from efficientface_deploy.backends import onnx as onnx_backend
from efficientface_deploy.dataset import iterate_batches, read_dataset
from efficientface_deploy.errors import BackendError, ExportError
from efficientface_deploy.metrics import accuracy, max_probability_difference, top1_agreement
from efficientface_deploy.preprocess import normalise
from efficientface_deploy.spec import ModelSpec

LAYERS = ("Conv", "Gemm")


def types_of(graph: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {weight.name: weight.data_type for weight in inferred.initializer}


def by_output(graph: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.graph.node for name in node.output}


def int8_of(
    graph: onnx.ModelProto, images: np.ndarray, method: str = "minmax", exclude: Any = ()
) -> onnx.ModelProto:
    """INT8 with ranges of these images."""
    ranges = tensor_ranges(graph, images)
    largest = {name: ranges[name] for name in quantised_inputs(graph)}
    return quantise(graph, activation_limits(graph, largest, images, method), exclude)


@pytest.fixture(scope="module")
def int8(graph: onnx.ModelProto, images: np.ndarray) -> onnx.ModelProto:
    return int8_of(graph, images)


@pytest.fixture(scope="module")
def fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    return to_fp16(graph)


class TestFP16:
    def test_layers_are_fp16(self, fp16: onnx.ModelProto) -> None:
        types = types_of(fp16)
        layers = [node for node in fp16.graph.node if node.op_type in LAYERS]
        assert len(layers) == 71
        for node in layers:
            assert {types[name] for name in [*node.input, *node.output]} == {TensorProto.FLOAT16}

    def test_picture_is_cast_straight_to_fp16(self, fp16: onnx.ModelProto) -> None:
        types = types_of(fp16)
        (first,) = [node for node in fp16.graph.node if "image" in node.input]
        assert first.op_type == "Cast"
        assert types["image"] == TensorProto.UINT8
        assert types[first.output[0]] == TensorProto.FLOAT16

    def test_softmax_and_outputs_are_fp32(self, fp16: onnx.ModelProto, infer: Any) -> None:
        types = types_of(fp16)
        (softmax,) = [node for node in fp16.graph.node if node.op_type == "Softmax"]
        assert types[softmax.input[0]] == types[softmax.output[0]] == TensorProto.FLOAT
        assert types["logits"] == types["probabilities"] == TensorProto.FLOAT
        casts = [node for node in fp16.graph.node if node.op_type == "Cast"]
        assert len(casts) == 2  # the picture, and the logits

    def test_result(
        self, graph: onnx.ModelProto, fp16: onnx.ModelProto, images: np.ndarray, infer: Any
    ) -> None:
        full, half = infer(graph, images), infer(fp16, images)
        assert 0 < max_probability_difference(full[1], half[1]) < 0.01
        np.testing.assert_allclose(half[1].sum(axis=1), 1, atol=1e-6)

    def test_input_is_not_changed(self, graph: onnx.ModelProto) -> None:
        before = graph.SerializeToString(deterministic=True)
        to_fp16(graph)
        assert graph.SerializeToString(deterministic=True) == before

    def test_large_weights_are_not_clipped(self, graph: onnx.ModelProto) -> None:
        """The converter clips above 1e4 by default, without an error."""
        large = _with_weight(graph, "fc.bias", 15_000.0)
        converted = to_fp16(large)
        (bias,) = [w for w in converted.graph.initializer if w.name.endswith("fc.bias")]
        assert numpy_helper.to_array(bias).max() == 15_000

    def test_missing_converter(
        self, graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "onnxconverter_common", None)
        with pytest.raises(BackendError, match=r"onnxconverter-common.*\[engine\]"):
            to_fp16(graph)


class TestFP16Range:
    def test_a_network_that_fits(self, graph: onnx.ModelProto, images: np.ndarray) -> None:
        name, largest = require_fp16_range(tensor_ranges(graph, images[:4]), "model.onnx")
        assert name in {output for node in graph.graph.node for output in node.output}
        assert images[:4].max() <= largest < FP16_MAX / FP16_MARGIN

    def test_activations_that_do_not_fit(
        self, graph: onnx.ModelProto, images: np.ndarray, infer: Any
    ) -> None:
        """A finite result on a CPU proves nothing: it computes FP16 convolutions in FP32."""
        first = next(node for node in graph.graph.node if node.op_type == "Conv")
        scaled = _scaled_weight(graph, first.input[1], 5e3)
        with pytest.raises(ExportError, match=r"model.onnx: expected every tensor below 16376"):
            require_fp16_range(tensor_ranges(scaled, images[:4]), "model.onnx")

    def test_weights_that_do_not_fit(self, graph: onnx.ModelProto, images: np.ndarray) -> None:
        large = _with_weight(graph, "fc.bias", 7e4)
        with pytest.raises(ExportError, match=r"fc\.bias|logits"):
            require_fp16_range(tensor_ranges(large, images[:4]), "model.onnx")

    @pytest.mark.parametrize("worst", [FP16_MAX / FP16_MARGIN, np.inf])
    def test_limit(self, worst: float) -> None:
        with pytest.raises(ExportError, match="in b; export with --precision fp32"):
            require_fp16_range({"a": 3.0, "b": worst, "c": 4.0}, "x")
        assert require_fp16_range({"a": 3.0, "b": 16_375.0}, "x") == ("b", 16_375.0)


class TestINT8:
    def test_symmetric_and_per_channel(self, int8: onnx.ModelProto) -> None:
        weights = {weight.name: weight for weight in int8.graph.initializer}
        pairs = Counter()
        for node in int8.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            zero_point = weights[node.input[2]]
            assert zero_point.data_type == TensorProto.INT8
            assert not numpy_helper.to_array(zero_point).any()
            scale = numpy_helper.to_array(weights[node.input[1]])
            stored = weights.get(node.input[0])
            if stored is None:
                assert scale.size == 1
                pairs[node.op_type] += 1
            else:  # a layer's weights
                assert stored.data_type == TensorProto.INT8
                assert scale.shape == (stored.dims[0],)
                pairs["weights"] += 1
        assert pairs["weights"] == 71
        assert pairs["QuantizeLinear"] == pairs["DequantizeLinear"] > 40

    def test_every_layer_takes_int8_and_a_float_bias(self, int8: onnx.ModelProto) -> None:
        producers, types = by_output(int8), types_of(int8)
        layers = [node for node in int8.graph.node if node.op_type in LAYERS]
        assert len(layers) == 71
        for node in layers:
            data, weight, *bias = node.input
            assert producers[data].op_type == producers[weight].op_type == "DequantizeLinear"
            for name in bias:
                assert name not in producers and types[name] == TensorProto.FLOAT
        assert "int32" not in {
            onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).name
            for weight in int8.graph.initializer
            if "bias" in weight.name
        }

    def test_nothing_between_a_convolution_and_its_relu(self, int8: onnx.ModelProto) -> None:
        producers = by_output(int8)
        relus = [node for node in int8.graph.node if node.op_type == "Relu"]
        assert len(relus) > 30
        assert {producers[node.input[0]].op_type for node in relus} <= {"Conv", "Gemm"}
        quantised = [node for node in int8.graph.node if node.op_type == "QuantizeLinear"]
        made_by = {producers[node.input[0]].op_type for node in quantised}
        assert not made_by & {"QuantizeLinear", "DequantizeLinear"}

    def test_no_pair_directly_after_a_layer_that_has_a_relu(self, int8: onnx.ModelProto) -> None:
        consumers: dict[str, list[str]] = {}
        for node in int8.graph.node:
            for name in node.input:
                consumers.setdefault(name, []).append(node.op_type)
        for node in int8.graph.node:
            if node.op_type == "Conv" and "Relu" in consumers[node.output[0]]:
                assert consumers[node.output[0]] == ["Relu"]

    def test_weights_are_rounded_to_the_nearest_step(
        self, graph: onnx.ModelProto, int8: onnx.ModelProto
    ) -> None:
        full = {weight.name: numpy_helper.to_array(weight) for weight in graph.graph.initializer}
        stored = {weight.name: numpy_helper.to_array(weight) for weight in int8.graph.initializer}
        pairs = [n for n in int8.graph.node if n.op_type == "DequantizeLinear"]
        rounded = [n for n in pairs if n.input[0] in stored]
        assert len(rounded) == 71
        for node in rounded:
            name = node.input[0].removesuffix("_quantized")
            weight = full[name]
            values, scale, _ = (stored[name] for name in node.input)
            step = scale.reshape(-1, *[1] * (weight.ndim - 1))
            assert (np.abs(values * step - weight) <= 0.5001 * step).all()
            assert (np.abs(values).reshape(len(weight), -1).max(axis=1) == 127).all()
            assert name not in stored  # FP32 is gone from the file

    def test_ranges_arrive(
        self, graph: onnx.ModelProto, int8: onnx.ModelProto, images: np.ndarray
    ) -> None:
        largest = tensor_ranges(graph, images)
        weights = {weight.name: weight for weight in int8.graph.initializer}
        pairs = [node for node in int8.graph.node if node.op_type == "QuantizeLinear"]
        for node in pairs:
            scale = float(numpy_helper.to_array(weights[node.input[1]]))
            assert scale * 127 == pytest.approx(largest[node.input[0]], rel=1e-5)

    def test_methods_give_other_graphs(
        self, graph: onnx.ModelProto, int8: onnx.ModelProto, images: np.ndarray
    ) -> None:
        scales = []
        for quantised in (int8, *(int8_of(graph, images, m) for m in ("entropy", "percentile"))):
            weights = {weight.name: weight for weight in quantised.graph.initializer}
            pairs = [node for node in quantised.graph.node if node.op_type == "QuantizeLinear"]
            found = [float(numpy_helper.to_array(weights[node.input[1]])) for node in pairs]
            scales.append(np.array(found))
        minmax, entropy, percentile = scales
        assert (entropy <= minmax * 1.0001).all() and (percentile <= minmax * 1.0001).all()
        assert entropy.sum() < 0.97 * minmax.sum()
        assert not np.allclose(entropy, percentile)

    def test_result(
        self, graph: onnx.ModelProto, int8: onnx.ModelProto, images: np.ndarray, infer: Any
    ) -> None:
        full, rounded = infer(graph, images), infer(int8, images)
        assert top1_agreement(full[1], rounded[1]) > 0.8
        assert 0.001 < max_probability_difference(full[1], rounded[1]) < 0.7

    def test_excluded_layers_stay(self, graph: onnx.ModelProto, images: np.ndarray) -> None:
        names = [node.name for node in graph.graph.node if node.op_type == "Conv"][:2]
        quantised = int8_of(graph, images[:4], exclude=[*names, names[0]])
        summary = summarise_precision(quantised)
        assert summary.convolutions == {"int8": 66, "fp32": 2}
        assert str(summary) == "2 fp32 + 66 int8 convolutions, 3 int8 linear"
        assert require_precision(quantised, "int8", 2, "x") == str(summary)
        assert summarise_precision(to_fp16(quantised)).convolutions == {"int8": 66, "fp16": 2}
        with pytest.raises(ExportError, match="in int8 but 1 that were excluded, found 2 fp32"):
            require_precision(quantised, "int8", 1, "x")

    def test_unknown_node(self, graph: onnx.ModelProto, images: np.ndarray) -> None:
        name = next(node.name for node in graph.graph.node if node.op_type == "Conv")
        with pytest.raises(ExportError, match=f"such as {name}, .*found {name}x, nonsense"):
            int8_of(graph, images[:4], exclude=[name + "x", "nonsense"])
        other = next(node.name for node in graph.graph.node if node.op_type == "Relu")
        with pytest.raises(ExportError, match="names of convolutions or linear layers"):
            int8_of(graph, images[:4], exclude=[other])


@pytest.mark.parametrize("transposed", [0, 1])
def test_scales_lie_on_the_output_channels(transposed: int) -> None:
    """Also of a linear layer whose weights are (in, out), and of channels of zeros or nearly so."""
    weight = np.array([[1, 0, 0], [-20, 0, 1e-9], [4, 0, 0]], dtype=np.float32)  # (in, out)
    stored = weight.T if transposed else weight
    values = [
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])
        for name, width in (("x", 3), ("y", 3))
    ]
    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], "fc", transB=transposed)
    initializer = numpy_helper.from_array(np.ascontiguousarray(stored), "w")
    graph = onnx.helper.make_model(
        onnx.helper.make_graph([node], "test", values[:1], values[1:], [initializer])
    )
    quantised = quantise(graph, {"x": 0.0})
    arrays = {w.name: numpy_helper.to_array(w) for w in quantised.graph.initializer}
    np.testing.assert_allclose(arrays["w_scale"], [20 / 127, 1 / 127, FP16_TINY])
    assert (arrays["w_scale"].astype(np.float16) > 0).all()
    rounded = arrays["w_quantized"].T if transposed else arrays["w_quantized"]
    np.testing.assert_array_equal(rounded, [[6, 0, 0], [-127, 0, 0], [25, 0, 0]])
    assert arrays["x_scale"] == np.float32(1 / 127)  # of what was always zero


def test_float_input_is_rounded_too(
    float_graph: onnx.ModelProto, images: np.ndarray, small_spec: ModelSpec
) -> None:
    """Then the first convolution reads what the user gives, and no node makes it."""
    quantised = int8_of(float_graph, normalise(images[:4], small_spec), "percentile")
    assert require_precision(quantised, "int8", 0, "x").startswith("68 int8")


def test_luminance_is_not_quantised(grey_graph: onnx.ModelProto, images: np.ndarray) -> None:
    quantised = int8_of(grey_graph, images[:4])
    (luma,) = [
        node
        for node in quantised.graph.node
        if node.op_type == "Conv" and node.input[1].endswith("luma")
    ]
    assert by_output(quantised)[luma.input[0]].op_type != "DequantizeLinear"
    assert summarise_precision(quantised).convolutions == {"int8": 68}
    assert summarise_precision(to_fp16(quantised)).convolutions == {"int8": 68}
    assert summarise_precision(to_fp16(grey_graph)).convolutions == {"fp16": 68}


class TestNoSilentFP32:
    """The complaint about other tools: asked for FP16 or INT8, got FP32."""

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_fp32_under_another_name(self, graph: onnx.ModelProto, precision: str) -> None:
        with pytest.raises(ExportError, match=f"in {precision}, found 68 fp32 convolutions"):
            require_precision(graph, precision, 0, f"efficientface-{precision}-cpu.onnx")

    def test_right_names(
        self, graph: onnx.ModelProto, fp16: onnx.ModelProto, int8: onnx.ModelProto
    ) -> None:
        assert require_precision(graph, "fp32", 0, "x") == "68 fp32 convolutions, 3 fp32 linear"
        assert require_precision(fp16, "fp16", 0, "x") == "68 fp16 convolutions, 3 fp16 linear"
        assert require_precision(int8, "int8", 0, "x") == "68 int8 convolutions, 3 int8 linear"
        assert require_precision(to_fp16(int8), "int8", 0, "x").startswith("68 int8")
        with pytest.raises(ExportError):
            require_precision(fp16, "fp32", 0, "x")

    def test_one_layer_is_enough(self, graph: onnx.ModelProto, int8: onnx.ModelProto) -> None:
        broken = onnx.ModelProto()
        broken.CopyFrom(int8)
        producers = by_output(broken)
        layer = next(node for node in broken.graph.node if node.op_type == "Conv")
        quantiser = producers[producers[layer.input[0]].input[0]]
        layer.input[0] = quantiser.input[0]  # around its pair
        with pytest.raises(ExportError, match="found 1 fp32 \\+ 67 int8"):
            require_precision(broken, "int8", 0, "x")

    def test_weights_alone_are_not_int8(self, int8: onnx.ModelProto) -> None:
        broken = onnx.ModelProto()
        broken.CopyFrom(int8)
        producers = by_output(broken)
        for layer in broken.graph.node:
            if layer.op_type in LAYERS:
                layer.input[0] = producers[producers[layer.input[0]].input[0]].input[0]
        with pytest.raises(ExportError, match="found 68 fp32 convolutions"):
            require_precision(broken, "int8", 100, "x")


def test_fp16_with_pairs_gives_the_same_as_fp32_with_pairs(
    prototype: Path, ferplus: Path, tmp_path: Path, infer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real weights: one optimisation of ONNX Runtime breaks INT8 in FP16, and ours avoids it."""
    source = open_source(prototype, "ferplus")
    data = read_dataset(ferplus, "ferplus")
    calibration = next(iter(iterate_batches(data.split("train"), source.spec, 120)))[0]
    images, labels = next(iter(iterate_batches(data.split("validation"), source.spec, 300)))
    full = source.trace(False)
    cpu = int8_of(full, calibration)
    gpu = to_fp16(cpu)
    path = tmp_path / "gpu.onnx"
    write_onnx(gpu, path, source.spec, {"precision": "int8", "target": "gpu"})

    reference = infer(full, images)[1]
    on_cpu = infer(cpu, images)[1]
    with load(path, threads=1) as predictor:
        right = np.concatenate(
            [predictor.infer(images[at : at + 50])[1] for at in range(0, 300, 50)]
        )
    monkeypatch.setattr(onnx_backend, "_UNSAFE_FOR_FP16_SCALES", [])
    with load(path, threads=1) as predictor:
        wrong = np.concatenate(
            [predictor.infer(images[at : at + 50])[1] for at in range(0, 300, 50)]
        )

    assert top1_agreement(reference, on_cpu) >= 0.97
    assert accuracy(labels, on_cpu.argmax(axis=1)) > 0.8
    assert max_probability_difference(on_cpu, right) < 0.1
    assert top1_agreement(on_cpu, right) >= 0.98
    # Should this fail one day, ONNX Runtime has mended it, and the exception can go.
    difference = max_probability_difference(on_cpu, right)
    assert max_probability_difference(on_cpu, wrong) > 1.5 * difference


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_optimisations_are_kept_from_fp16_scales_alone(
    exported: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """INT8 with FP32 scales has all of them; every file is loaded once."""
    seen: list[dict[str, Any]] = []
    make = onnxruntime.InferenceSession

    def recorded(*arguments: Any, **keywords: Any) -> Any:
        seen.append(keywords)
        return make(*arguments, **keywords)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    with load(exported / f"efficientface-{precision}-cpu.onnx", threads=1):
        pass
    (keywords,) = seen
    assert ("disabled_optimizers" in keywords) == (precision != "int8")


def _with_weight(graph: onnx.ModelProto, ending: str, value: float) -> onnx.ModelProto:
    (name,) = [w.name for w in graph.graph.initializer if w.name.endswith(ending)]
    return _changed(graph, name, lambda array: np.full_like(array, value))


def _scaled_weight(graph: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    return _changed(graph, name, lambda array: array * np.float32(factor))


def _changed(graph: onnx.ModelProto, name: str, change: Any) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    (weight,) = [w for w in copy.graph.initializer if w.name == name]
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight)), name))
    return copy
