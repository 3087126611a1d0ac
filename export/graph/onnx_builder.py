"""ONNX nodes one by one, with the order of every map's channels kept in sight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from efficientface_deploy.artifact import FLOAT_INPUT, OUTPUTS, UINT8_INPUT
from efficientface_export.graph.channel_layout import pad
from efficientface_export.graph.io import IR_VERSION, OPSET

Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Map:
    """A feature map in the graph.

    Attributes:
        name: Of the tensor, (N, len(channels), H, W).
        channels: The network's number of each one; None is a channel of zeros.
        side: H = W.
    """

    name: str
    channels: tuple[int | None, ...]
    side: int


class GraphBuilder:
    """Writes nodes and weights; a network's own graph is a subclass.

    Args:
        align: Channels of a block; maps are padded to whole ones.
    """

    def __init__(self, align: int) -> None:
        self.align = align
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.constants: dict[tuple[int, ...], str] = {}

    def model(self, float_input: bool, side: int, classes: int) -> onnx.ModelProto:
        """The finished graph: one input of ``side`` pixels, logits and probabilities."""
        info = helper.make_tensor_value_info
        if float_input:
            entry = info(FLOAT_INPUT, TensorProto.FLOAT, ["N", 3, side, side])
        else:
            entry = info(UINT8_INPUT, TensorProto.UINT8, ["N", side, side, 3])
        exits = [info(name, TensorProto.FLOAT, ["N", classes]) for name in OUTPUTS]
        graph = helper.make_graph(
            self.nodes, "efficientface", [entry], exits, initializer=self.initializers
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def pointwise(
        self,
        name: str,
        x: Map,
        weight: Array,
        bias: Array,
        *,
        relu: bool = False,
        order: Sequence[int | None] | None = None,
    ) -> Map:
        """A 1x1 convolution whose weights (out, in, 1, 1) are in the network's order."""
        order = self.padded(len(weight)) if order is None else tuple(order)
        weight = columns_in_order(rows_in_order(weight, order), x.channels)
        result = self.conv(name, x.name, weight, rows_in_order(bias, order), relu=relu)
        return Map(result, order, x.side)

    def depthwise(self, name: str, x: Map, weight: Array, bias: Array, stride: int) -> Map:
        """A depthwise convolution; weights (C, 1, 3, 3) are in the network's order."""
        weight, bias = rows_in_order(weight, x.channels), rows_in_order(bias, x.channels)
        options: dict[str, Any] = {"strides": [stride, stride], "pads": [1, 1, 1, 1]}
        result = self.conv(name, x.name, weight, bias, group=len(weight), **options)
        return Map(result, x.channels, x.side // stride)

    def conv(
        self,
        name: str,
        x: str,
        weight: Array,
        bias: Array,
        *,
        relu: bool = False,
        **attributes: Any,
    ) -> str:
        """A convolution, with ReLU on request; ``weight`` is (out, in / group, kh, kw)."""
        inputs = [x, self.array(f"{name}.weight", weight), self.array(f"{name}.bias", bias)]
        result = self.node("Conv", name, inputs, kernel_shape=list(weight.shape[2:]), **attributes)
        return self.node("Relu", f"{name}.relu", [result]) if relu else result

    def cut(
        self, name: str, x: str, axes: Sequence[int], starts: Sequence[int], stops: Sequence[int]
    ) -> str:
        """A slice."""
        inputs = [self.integers(*starts), self.integers(*stops), self.integers(*axes)]
        return self.node("Slice", name, [x, *inputs])

    def node(self, operator: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        self.nodes.append(helper.make_node(operator, inputs, [name + ":0"], name, **attributes))
        return name + ":0"

    def array(self, name: str, value: npt.NDArray[Any]) -> str:
        """A constant: int64, or float32."""
        value = value if value.dtype == np.int64 else value.astype(np.float32)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def integers(self, *values: int) -> str:
        """The name of a constant int64 vector, one for equal ones."""
        if values not in self.constants:
            name = "const." + ".".join(map(str, values))
            self.constants[values] = self.array(name, np.array(values, dtype=np.int64))
        return self.constants[values]

    def padded(self, count: int) -> tuple[int | None, ...]:
        """Channels 0 to count - 1, then zeros up to a whole block."""
        return tuple(pad(range(count), self.align))


def rows_in_order(array: Array, order: Sequence[int | None]) -> Array:
    """The rows of an array in another order; None is a row of zeros."""
    padded = np.concatenate((array, np.zeros((1, *array.shape[1:]), array.dtype)))
    return padded[[len(array) if index is None else index for index in order]]


def columns_in_order(array: Array, order: Sequence[int | None]) -> Array:
    """The same for the second axis."""
    return rows_in_order(array.swapaxes(0, 1), order).swapaxes(0, 1)
