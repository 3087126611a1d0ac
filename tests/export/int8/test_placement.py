"""INT8 where it costs a GPU no kernel: the layers that are chosen, and what is done for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.predictor import BUNDLED_WEIGHTS
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_deploy.workbench.dataset import read_dataset
from efficientface_deploy.workbench.metrics import mean_kl, top1_agreement
from efficientface_export.graph.channel_layout import PROFILES
from efficientface_export.graph.efficientface import deploy_graph
from efficientface_export.graph.io import with_features
from efficientface_export.graph.precision import FP16_MARGIN, FP16_MAX, to_fp16
from efficientface_export.int8.calibration import read_images
from efficientface_export.int8.placement import free_layers, lay_out_for_gpu
from efficientface_export.int8.qdq import (
    SCHEMES,
    depthwise_behind,
    groups_of,
    quantisable_layers,
    quantise,
    quantised_groups,
)
from efficientface_export.int8.ranges import activation_amax, tensor_ranges

FREE = {
    *(f"stage2.{unit}.branch2.in" for unit in (2, 3)),
    "stage3.0.in",
    *(f"stage3.{unit}.branch2.in" for unit in range(2, 8)),
    "stage4.0.in",
    *(f"stage4.{unit}.branch2.in" for unit in range(1, 4)),
    "conv5",
}


def for_a_gpu(model: EfficientFace, spec: ModelSpec, **options: Any) -> onnx.ModelProto:
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    return deploy_graph(weights, spec, PROFILES["gpu"], **options)


def values_of(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {weight.name: numpy_helper.to_array(weight) for weight in graph.graph.initializer}


@pytest.fixture(scope="module")
def bundled() -> tuple[onnx.ModelProto, ModelSpec]:
    """The bundled model's FP32 graph for a GPU."""
    network, spec = load_checkpoint(BUNDLED_WEIGHTS)
    return for_a_gpu(network, spec), spec


@pytest.fixture(scope="module")
def random_graph(network: EfficientFace, small_spec: ModelSpec) -> onnx.ModelProto:
    return for_a_gpu(network, small_spec)


def test_layers_of_the_bundled_model(bundled: tuple[onnx.ModelProto, ModelSpec]) -> None:
    """Those behind a concat or the gate; not those behind a convolution, and not the stem."""
    graph, _ = bundled
    assert free_layers(graph) == FREE
    assert free_layers(with_features(graph)) == FREE
    prepared, left_out = lay_out_for_gpu(graph)
    layers = {layer.name for layer in quantisable_layers(graph)}
    assert left_out == layers - FREE and len(left_out) == 45
    rounded = [group.tensors for group in quantised_groups(prepared, SCHEMES["gpu"], left_out)]
    makers = {node.output[0]: node.op_type for node in graph.graph.node}
    assert len(rounded) == len(FREE)
    assert {makers[name] for (name,) in rounded} == {"Concat", "Add"}


@pytest.mark.parametrize("side", [64, 96, 224])
@pytest.mark.parametrize("classes", [7, 8])
def test_the_network_decides_and_not_its_size(
    make_network: Callable[..., EfficientFace], side: int, classes: int
) -> None:
    spec = preset("rafdb" if classes == 7 else "ferplus").replace(input_size=side)
    network = make_network(classes)
    assert free_layers(for_a_gpu(network, spec, float_input=side == 96)) == FREE


def test_plain_graph_has_such_layers_too(graph: onnx.ModelProto) -> None:
    """Behind the shuffles of torch's own export; of 68 convolutions."""
    names = free_layers(graph)
    assert len(names) == 14
    sizes = {name: value.size for name, value in values_of(graph).items()}
    layers = quantisable_layers(graph)
    held = sum(sizes[layer.input[1]] for layer in layers if layer.name in names)
    assert held > 0.5 * sum(sizes[layer.input[1]] for layer in layers)


def test_what_is_prepared_computes_the_same(
    bundled: tuple[onnx.ModelProto, ModelSpec], random_graph: onnx.ModelProto, infer: Any
) -> None:
    for graph in (bundled[0], random_graph):
        side = graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value
        shape = (3, side, side, 3)
        pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        before = graph.SerializeToString()
        prepared, _ = lay_out_for_gpu(graph)
        expected, found = infer(graph, pictures)[0], infer(prepared, pictures)[0]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert graph.SerializeToString() == before, "its argument stays as it is"
        onnx.checker.check_model(prepared, full_check=True)


def test_channels_become_as_wide_as_the_widest(random_graph: onnx.ModelProto) -> None:
    """Up to a ratio of 32; and nothing becomes larger, so that it fits FP16 as before."""
    prepared, _ = lay_out_for_gpu(random_graph)
    before, after = values_of(random_graph), values_of(prepared)
    seen = 0
    for layer in quantisable_layers(prepared):
        if layer.name not in FREE:
            continue
        name = layer.input[1]
        depthwise = depthwise_behind(random_graph, layer)
        if depthwise is None:
            assert layer.name == "conv5"
            np.testing.assert_array_equal(after[name], before[name])
            continue
        old, new = (np.abs(values[name]).max(axis=(1, 2, 3)) for values in (before, after))
        lives = old > 0  # the others fill blocks
        np.testing.assert_allclose(new[lives], old.max() / 32, rtol=1e-5)
        assert not new[~lives].any()
        bias = after[layer.input[2]]
        assert (np.abs(bias) <= np.abs(before[layer.input[2]]) * 1.00001).all()
        seen += int(lives.sum())
    assert seen > 1000


def small(
    last: float = 1.0, multiplier: int = 1, operator: str = "Relu", smallest: float = 1.0
) -> onnx.ModelProto:
    """A sum, a 1x1 convolution of four channels, something, a depthwise one, and a mean."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 16, 1, 1))
    weight[1] *= 0.1
    weight[3] *= smallest
    depthwise = last * random.standard_normal((4 * multiplier, 1, 3, 3))
    constants = {
        "one": np.ones((1, 16, 1, 1)),
        "first.weight": weight,
        "first.bias": random.standard_normal(4),
        "second.weight": depthwise,
    }
    info, node = helper.make_tensor_value_info, helper.make_node
    return helper.make_model(
        helper.make_graph(
            [
                node("Add", ["input", "one"], ["sum"], "add"),
                node("Conv", ["sum", "first.weight", "first.bias"], ["first"], "first"),
                node(operator, ["first"], ["moved"], "moved"),
                node("Conv", ["moved", "second.weight"], ["second"], "second", group=4),
                node("GlobalAveragePool", ["second"], ["logits"], "pool"),
                node("Softmax", ["logits"], ["probabilities"], "softmax", axis=1),
            ],
            "small",
            [info("input", TensorProto.FLOAT, ["N", 16, 6, 6])],
            [info(name, TensorProto.FLOAT, None) for name in ("logits", "probabilities")],
            [
                numpy_helper.from_array(value.astype(np.float32), name)
                for name, value in constants.items()
            ],
        ),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("smallest", [1.0, 1e-4, 0.0])
@pytest.mark.parametrize("last", [1.0, 2000.0])
def test_scales_of_one_layer(multiplier: int, smallest: float, last: float, infer: Any) -> None:
    """Also where depthwise weights leave little room in FP16, or a channel is all but zero."""
    graph = small(last, multiplier, smallest=smallest)
    prepared, left_out = lay_out_for_gpu(graph)
    assert left_out == {"second"}
    pictures = np.random.default_rng(1).standard_normal((5, 16, 6, 6)).astype(np.float32)
    expected, found = infer(graph, pictures)[0], infer(prepared, pictures)[0]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    before, after = values_of(graph), values_of(prepared)
    assert np.abs(after["second.weight"]).max() <= FP16_MAX / FP16_MARGIN * 1.001
    assert (np.abs(after["first.weight"]) <= np.abs(before["first.weight"])).all()
    widest = np.abs(after["first.weight"]).max(axis=(1, 2, 3))
    if last == 1.0:
        np.testing.assert_allclose(widest[:3], widest.max(), rtol=1e-5)
    if smallest == 1e-4:
        assert widest[3] < 0.1 * widest.max(), "the ratio is limited"


def test_only_a_relu_lets_factors_through() -> None:
    graph = small(operator="Sigmoid")
    prepared, left_out = lay_out_for_gpu(graph)
    assert left_out == {"second"} and prepared == graph


def test_a_result_of_the_network_keeps_its_scale() -> None:
    graph = small()
    graph.graph.output.append(helper.make_tensor_value_info("moved", TensorProto.FLOAT, None))
    assert lay_out_for_gpu(graph)[0] == graph


def test_where_hardly_a_layer_is_free_all_are_taken() -> None:
    """As in a ResNet: an engine in INT8 then has more kernels, and the export says so."""
    graph = small(multiplier=8)
    assert free_layers(graph) == frozenset()
    assert lay_out_for_gpu(graph) == (graph, frozenset())


def test_the_grouped_layer_that_is_read_whole_becomes_dense(random_graph: onnx.ModelProto) -> None:
    """Of the layers with two groups only stage 3's is read whole, and sliced for others."""
    prepared, _ = lay_out_for_gpu(random_graph)
    for graph, expected in (
        (random_graph, {"stage3.0.out", "stage4.0.out"}),
        (prepared, {"stage4.0.out"}),
    ):
        found = {layer.name for layer in quantisable_layers(graph) if groups_of(layer) == 2}
        assert found == expected
    before, after = (values_of(x)["stage3.0.out.weight"] for x in (random_graph, prepared))
    rows, columns = before.shape[0] // 2, before.shape[1]
    np.testing.assert_array_equal(after[:rows, :columns], before[:rows])
    np.testing.assert_array_equal(after[rows:, columns:], before[rows:])
    assert not after[:rows, columns:].any() and not after[rows:, :columns].any()


def test_real_faces_get_the_same_labels(
    bundled: tuple[onnx.ModelProto, ModelSpec], ferplus: Path, infer: Any
) -> None:
    """Without a search, after FP16 too; on all of FER+ validation 99.8 % agree, KL is 9e-5."""
    graph, spec = bundled
    dataset = read_dataset(ferplus, "ferplus")
    calibration = read_images(dataset.split("train"), spec)
    pictures = read_images(dataset.split("validation"), spec)
    prepared, left_out = lay_out_for_gpu(graph)
    names = [g.tensors[0] for g in quantised_groups(prepared, SCHEMES["gpu"], left_out)]
    ranges = tensor_ranges(prepared, calibration)
    largest = {name: ranges[name] for name in names}
    amax = activation_amax(prepared, largest, calibration, "percentile")
    quantised = to_fp16(quantise(prepared, amax, SCHEMES["gpu"], left_out))
    expected, found = infer(graph, pictures)[1], infer(quantised, pictures)[1]
    assert top1_agreement(expected, found) >= 0.99
    assert 1e-6 < mean_kl(expected, found) < 2e-4
