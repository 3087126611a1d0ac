"""The search for the layers that INT8 hurts most, on a small network with hurt made to order."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from efficientface_deploy.workbench.metrics import mean_kl
from efficientface_export.int8 import sensitivity
from efficientface_export.int8.qdq import SCHEMES, quantise, quantised_groups
from efficientface_export.int8.ranges import tensor_ranges
from efficientface_export.int8.sensitivity import KL_TARGET, Search, find_sensitive_layers

CLASSES = 4
GPU = SCHEMES["gpu"]
WIDTH = 16


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    """Two branches that read the same tensor, two convolutions after them, and a linear layer."""
    random = np.random.default_rng(0)

    def convolution(name: str, source: str, width: int) -> list[onnx.NodeProto]:
        weights[name] = random.standard_normal((WIDTH, width, 1, 1)) / np.sqrt(width)
        return [
            helper.make_node("Conv", [source, f"{name}.weight"], [f"{name}.sum"], name),
            helper.make_node("Relu", [f"{name}.sum"], [f"{name}.relu"]),
        ]

    weights: dict[str, np.ndarray] = {}
    nodes = [
        *convolution("left", "input", 3),
        *convolution("right", "input", 3),
        helper.make_node("Add", ["left.relu", "right.relu"], ["both"]),
        *convolution("third", "both", WIDTH),
        *convolution("fourth", "third.relu", WIDTH),
        helper.make_node("GlobalAveragePool", ["fourth.relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["features"]),
        helper.make_node("Gemm", ["features", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    weights["fc"] = 0.3 * random.standard_normal((CLASSES, WIDTH))
    return helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 4, 4])],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", CLASSES])
                for name in ("logits", "probabilities")
            ],
            [
                numpy_helper.from_array(np.zeros(CLASSES, dtype=np.float32), "fc.bias"),
                *(
                    numpy_helper.from_array(value.astype(np.float32), f"{name}.weight")
                    for name, value in weights.items()
                ),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((200, 3, 4, 4)).astype(np.float32)


def amax_of(graph: onnx.ModelProto, pictures: np.ndarray, **worse: float) -> dict[str, float]:
    """Ranges of all rounded tensors, some of them too wide by a factor: their steps are coarse."""
    ranges = tensor_ranges(graph, pictures)
    amax = {name: ranges[name] for group in quantised_groups(graph, GPU) for name in group.tensors}
    return {name: largest * worse.get(name.split(".")[0], 1.0) for name, largest in amax.items()}


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is so small that any layer would be more than a tenth of its file."""
    monkeypatch.setattr(sensitivity, "GROWTH", 10.0)


def divergence(
    graph: onnx.ModelProto, amax: dict[str, float], left_out: Any, pictures: Any, infer: Any
) -> float:
    return mean_kl(
        infer(graph, pictures)[1], infer(quantise(graph, amax, GPU, left_out), pictures)[1]
    )


def test_nothing_is_left_out_where_nothing_hurts(
    small: onnx.ModelProto, pictures: np.ndarray
) -> None:
    found = find_sensitive_layers(small, amax_of(small, pictures), GPU, pictures, (), 4)
    assert found.left_out == ()
    assert found.kl_before == found.kl_after <= KL_TARGET
    assert found.images == 200


@pytest.mark.parametrize("name", ["third", "fourth"])
def test_the_layer_that_hurts_is_left_out_alone(
    small: onnx.ModelProto, pictures: np.ndarray, infer: Any, roomy: None, name: str
) -> None:
    """Ranges of the layer's input are sixty times too wide: three or so levels remain."""
    source = {"third": "both", "fourth": "third"}[name]
    amax = amax_of(small, pictures, **{source: 60.0})
    found = find_sensitive_layers(small, amax, GPU, pictures, (), 4)
    assert found.left_out == (name,)
    assert found.kl_after <= KL_TARGET < found.kl_before
    assert found.kl_before == pytest.approx(divergence(small, amax, (), pictures, infer), rel=1e-3)
    assert found.kl_after == pytest.approx(
        divergence(small, amax, [name], pictures, infer), rel=1e-3
    )


def test_layers_that_read_one_tensor_go_together_and_the_worst_first(
    small: onnx.ModelProto, pictures: np.ndarray, roomy: None
) -> None:
    amax = amax_of(small, pictures, input=60.0, features=15.0)
    found = find_sensitive_layers(small, amax, GPU, pictures, (), 4)
    assert found.left_out == ("left", "right", "fc")


def test_excluded_layers_are_not_measured(
    small: onnx.ModelProto, pictures: np.ndarray, roomy: None
) -> None:
    amax = amax_of(small, pictures, both=60.0, features=60.0)
    found = find_sensitive_layers(small, amax, GPU, pictures, ("third",), 4)
    assert found.left_out == ("fc",)


def test_the_file_may_grow_by_a_tenth(
    small: onnx.ModelProto, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer too large is passed over for the next; FP16 takes a third of what FP32 adds."""
    amax = amax_of(small, pictures, both=60.0, features=40.0)
    size = quantise(small, amax, GPU).ByteSize()
    room = CLASSES * WIDTH * 3 + 1  # for the linear layer in FP32
    monkeypatch.setattr(sensitivity, "GROWTH", room / size)
    found = find_sensitive_layers(small, amax, GPU, pictures, (), 4)
    assert "fc" in found.left_out and "third" not in found.left_out
    assert found.kl_after > KL_TARGET
    assert "not 0.0002: more would make the file over" in found.describe()
    monkeypatch.setattr(sensitivity, "GROWTH", (WIDTH * WIDTH + CLASSES * WIDTH + 1) / size)
    in_halves = find_sensitive_layers(small, amax, GPU, pictures, (), 2)
    assert in_halves.left_out == ("third", "fc")
    assert "not" not in in_halves.describe()


def test_record_is_json() -> None:
    record = Search(("stem", "fc"), 256, 1e-3, 2e-4).record()
    assert json.loads(json.dumps(record)) == {
        "left_out": ["stem", "fc"],
        "images": 256,
        "kl_before": 1e-3,
        "kl_after": 2e-4,
        "kl_target": KL_TARGET,
    }
