"""INT8 as TensorRT and ONNX Runtime want it: where pairs go, and what is between them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from efficientface_deploy.errors import ExportError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import normalise
from efficientface_deploy.workbench.metrics import (
    max_probability_difference,
    mean_kl,
    top1_agreement,
)
from efficientface_export.graph.channel_layout import PROFILES
from efficientface_export.graph.efficientface import deploy_graph
from efficientface_export.graph.precision import require_precision, summarise_precision, to_fp16
from efficientface_export.int8.qdq import (
    FP16_TINY,
    SCHEMES,
    depthwise_behind,
    quantise,
    quantised_groups,
)
from efficientface_export.int8.ranges import tensor_ranges
from tests.export.graphs import by_input, by_output, types_of

LAYERS = ("Conv", "Gemm")


class TestForGPUs:
    def test_symmetric_and_one_scale_before_a_depthwise_convolution(
        self, graph: onnx.ModelProto, int8: onnx.ModelProto
    ) -> None:
        weights = {weight.name: weight for weight in int8.graph.initializer}
        readers = by_input(graph)
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
                (layer,) = readers[stored.name.removesuffix("_quantized")]
                shares = depthwise_behind(graph, layer) is not None
                assert scale.shape == (() if shares else (stored.dims[0],))
                pairs["shared" if shares else "weights"] += 1
        assert (pairs["weights"], pairs["shared"]) == (51, 20)
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
            largest = np.abs(values).reshape(len(weight), -1).max(axis=1)
            assert (largest == 127).all() if scale.shape else largest.max() == 127
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
        self, graph: onnx.ModelProto, int8: onnx.ModelProto, images: np.ndarray, int8_of: Any
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

    def test_excluded_layers_stay(
        self, graph: onnx.ModelProto, images: np.ndarray, int8_of: Any
    ) -> None:
        names = [node.name for node in graph.graph.node if node.op_type == "Conv"][:2]
        quantised = int8_of(graph, images[:4], exclude=[*names, names[0]])
        summary = summarise_precision(quantised)
        assert summary.convolutions == {"int8": 66, "fp32": 2}
        assert str(summary) == "2 fp32 + 66 int8 convolutions, 3 int8 linear"
        assert require_precision(quantised, "int8", 2, "x") == str(summary)
        assert summarise_precision(to_fp16(quantised)).convolutions == {"int8": 66, "fp16": 2}
        with pytest.raises(ExportError, match="in int8 but 1 that were excluded, found 2 fp32"):
            require_precision(quantised, "int8", 1, "x")

    def test_unknown_node(self, graph: onnx.ModelProto, images: np.ndarray, int8_of: Any) -> None:
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
    quantised = quantise(graph, {"x": 0.0}, SCHEMES["gpu"])
    arrays = {w.name: numpy_helper.to_array(w) for w in quantised.graph.initializer}
    np.testing.assert_allclose(arrays["w_scale"], [20 / 127, 1 / 127, FP16_TINY])
    assert (arrays["w_scale"].astype(np.float16) > 0).all()
    rounded = arrays["w_quantized"].T if transposed else arrays["w_quantized"]
    np.testing.assert_array_equal(rounded, [[6, 0, 0], [-127, 0, 0], [25, 0, 0]])
    assert arrays["x_scale"] == np.float32(1 / 127)  # of what was always zero


def test_float_input_is_rounded_too(
    float_graph: onnx.ModelProto, images: np.ndarray, small_spec: ModelSpec, int8_of: Any
) -> None:
    """Then the first convolution reads what the user gives, and no node makes it."""
    quantised = int8_of(float_graph, normalise(images[:4], small_spec), "percentile")
    assert require_precision(quantised, "int8", 0, "x").startswith("68 int8")


def test_luminance_is_not_quantised(
    grey_graph: onnx.ModelProto, images: np.ndarray, int8_of: Any
) -> None:
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


@pytest.fixture(scope="module", params=["plain", "deploy"])
def full(
    request: pytest.FixtureRequest, graph: onnx.ModelProto, network: Any, small_spec: ModelSpec
) -> onnx.ModelProto:
    """The network in FP32, in both layouts for a CPU."""
    if request.param == "plain":
        return graph
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    return deploy_graph(weights, small_spec, PROFILES["cpu"])


@pytest.fixture(scope="module")
def on_cpu(full: onnx.ModelProto, images: np.ndarray, int8_of: Any) -> onnx.ModelProto:
    return int8_of(full, images, target="cpu")


class TestForCPUs:
    def test_onnx_runtime_convolves_integers(self, on_cpu: onnx.ModelProto, tmp_path: Path) -> None:
        """What the format is for: not one convolution is left that computes in floats."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(
            on_cpu.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        runs = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
        asked = Counter(node.op_type for node in on_cpu.graph.node)
        assert runs["QLinearConv"] == asked["Conv"] > 60
        assert not runs["Conv"] + runs["FusedConv"] + runs["Relu"] + runs["Concat"]

    def test_activations_use_all_of_a_byte(
        self, full: onnx.ModelProto, on_cpu: onnx.ModelProto, images: np.ndarray
    ) -> None:
        """From zero on where nothing is negative, else about 128."""
        largest = tensor_ranges(full, images)
        arrays = {w.name: numpy_helper.to_array(w) for w in on_cpu.graph.initializer}
        producers = by_output(on_cpu)
        zeros = Counter()
        for node in on_cpu.graph.node:
            if node.op_type == "QuantizeLinear":
                scale, zero = (arrays[name] for name in node.input[1:])
                assert zero.dtype == np.uint8
                zeros[int(zero)] += 1
                steps = {0: 255, 128: 127}[int(zero)]
                # A group has the scale of its largest, up to what one more step is worth.
                assert scale * steps >= largest[node.input[0]] * 0.9999
                if producers[node.input[0]].op_type == "Relu":
                    assert zero == 0
        assert zeros[0] > 3 * zeros[128] > 0

    def test_weights_are_exact_where_two_products_are_added_in_16_bits(
        self, on_cpu: onnx.ModelProto
    ) -> None:
        weights = [
            numpy_helper.to_array(w) for w in on_cpu.graph.initializer if w.name.endswith("d")
        ]
        weights = [array for array in weights if array.dtype == np.int8 and array.ndim > 1]
        assert len(weights) > 60
        largest = max(int(np.abs(array.astype(np.int32)).max()) for array in weights)
        assert largest == 64
        assert 2 * 255 * largest <= np.iinfo(np.int16).max

    def test_what_is_only_moved_keeps_its_scale(self, on_cpu: onnx.ModelProto) -> None:
        arrays = {w.name: numpy_helper.to_array(w) for w in on_cpu.graph.initializer}
        pairs = {n.input[0]: n for n in on_cpu.graph.node if n.op_type == "QuantizeLinear"}
        producers = by_output(on_cpu)
        moved = 0
        for node in on_cpu.graph.node:
            if node.op_type in ("Concat", "MaxPool", "Transpose") and node.output[0] in pairs:
                results = pairs[node.output[0]]
                for name in node.input:
                    pair = producers[name]
                    assert pair.op_type == "DequantizeLinear"
                    assert arrays[pair.input[1]] == arrays[results.input[1]]
                    moved += 1
        assert moved > 20

    def test_result_is_nearer_than_that_for_a_gpu(
        self,
        full: onnx.ModelProto,
        on_cpu: onnx.ModelProto,
        images: np.ndarray,
        infer: Any,
        int8_of: Any,
    ) -> None:
        reference = infer(full, images)[1]
        divergence = mean_kl(reference, infer(on_cpu, images)[1])
        assert 0 < divergence < 1.5 * mean_kl(reference, infer(int8_of(full, images), images)[1])

    def test_without_optimisation_the_same(
        self, full: onnx.ModelProto, on_cpu: onnx.ModelProto, images: np.ndarray, infer: Any
    ) -> None:
        """Integers or floats between the pairs: the file means the same."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            on_cpu.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (plain,) = session.run(["probabilities"], {"image": images})
        assert top1_agreement(plain, infer(on_cpu, images)[1]) > 0.9
        assert max_probability_difference(plain, infer(on_cpu, images)[1]) < 0.2

    def test_excluded_layers_stay(
        self, full: onnx.ModelProto, images: np.ndarray, int8_of: Any
    ) -> None:
        names = [node.name for node in full.graph.node if node.op_type == "Conv"][:2]
        quantised = int8_of(full, images[:4], exclude=names, target="cpu")
        assert summarise_precision(quantised).convolutions["fp32"] == 2
        require_precision(quantised, "int8", 2, "x")

    def test_a_group_goes_when_all_that_read_it_are_excluded(self, full: onnx.ModelProto) -> None:
        groups = quantised_groups(full, SCHEMES["cpu"])
        for group in groups:
            left = quantised_groups(full, SCHEMES["cpu"], group.layers)
            assert group not in left
            if len(group.layers) > 1:
                assert group in quantised_groups(full, SCHEMES["cpu"], group.layers[1:])
        names = [name for group in groups for name in group.tensors]
        assert len(names) == len(set(names))
        assert not {"logits", "probabilities", "image"} & set(names)
