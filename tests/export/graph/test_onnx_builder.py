"""Nodes one by one: the order of channels, padding with zeros, constants."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from efficientface_export.graph.onnx_builder import (
    GraphBuilder,
    Map,
    columns_in_order,
    rows_in_order,
)

RANDOM = np.random.default_rng(0)
ORDER = (2, None, 0, 1)


def run(builder: GraphBuilder, name: str, pixels: np.ndarray) -> np.ndarray:
    """The tensor ``name`` of what the builder wrote, for an input float32 (N, 3, S, S)."""
    for index, output in enumerate(("logits", "probabilities")):
        inputs = [name] if index == 0 else ["flat"]
        operator = "Flatten" if index == 0 else "Softmax"
        builder.node(operator, f"end{index}", inputs)
        builder.nodes[-1].output[0] = "flat" if index == 0 else output
    builder.nodes.append(type(builder.nodes[0])(op_type="Identity", input=["flat"]))
    builder.nodes[-1].output.append("logits")
    model = builder.model(True, pixels.shape[-1], 4 * pixels.shape[-1] ** 2)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], {"input": pixels})[0].reshape(len(pixels), 4, *pixels.shape[2:])


@pytest.fixture
def pixels() -> np.ndarray:
    return RANDOM.standard_normal((2, 3, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("relu", [False, True])
def test_pointwise_gives_channels_in_the_order_asked_for(pixels: np.ndarray, relu: bool) -> None:
    weight = RANDOM.standard_normal((3, 3, 1, 1)).astype(np.float32)
    bias = RANDOM.standard_normal(3).astype(np.float32)
    builder = GraphBuilder(4)
    x = Map("input", (0, 1, 2), 6)
    made = builder.pointwise("a", x, weight, bias, relu=relu, order=ORDER)
    assert (made.channels, made.side) == (ORDER, 6)
    expected = torch.nn.functional.conv2d(*map(torch.from_numpy, (pixels, weight, bias)))
    expected = expected.relu() if relu else expected
    found = run(builder, made.name, pixels)
    np.testing.assert_allclose(found[:, [2, 3, 0]], expected, atol=1e-5)
    assert (found[:, 1] == 0).all()


def test_depthwise_keeps_the_order_of_its_input(pixels: np.ndarray) -> None:
    builder = GraphBuilder(4)
    eye = np.eye(3, dtype=np.float32)[:, :, None, None]
    none = np.zeros(3, np.float32)
    x = builder.pointwise("a", Map("input", (0, 1, 2), 6), eye, none, order=ORDER)
    weight = RANDOM.standard_normal((3, 1, 3, 3)).astype(np.float32)
    moved = builder.depthwise("b", x, weight, none, 1)
    assert (moved.channels, moved.side) == (ORDER, 6)
    tensors = torch.from_numpy(pixels), torch.from_numpy(weight)
    expected = torch.nn.functional.conv2d(*tensors, padding=1, groups=3)
    np.testing.assert_allclose(run(builder, moved.name, pixels)[:, [2, 3, 0]], expected, atol=1e-5)


def test_orders() -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(rows_in_order(array, (2, None, 0)), [[4, 5], [0, 0], [0, 1]])
    np.testing.assert_array_equal(columns_in_order(array, (1, None)), [[1, 0], [3, 0], [5, 0]])
    assert GraphBuilder(4).padded(5) == (0, 1, 2, 3, 4, None, None, None)


def test_equal_constants_are_stored_once() -> None:
    builder = GraphBuilder(1)
    assert builder.integers(2, 3) == builder.integers(2, 3) != builder.integers(3, 2)
    assert len(builder.initializers) == 2
