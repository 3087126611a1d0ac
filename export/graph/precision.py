"""Precision is a property of the ONNX graph: FP16 tensors, or INT8 by Q/DQ pairs.

One file then serves ONNX Runtime and TensorRT alike, which builds it strongly typed and decides
nothing by itself.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from efficientface_deploy.artifact import OUTPUTS
from efficientface_deploy.errors import ExportError, words_of
from efficientface_export.int8.qdq import QUANTISED_OPERATORS, quantisable_layers

FP16_MAX = 65_504.0
# A range measured on some hundred faces will be exceeded by others.
FP16_MARGIN = 4.0

_TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
}


# What other tools quantise to; ours are pairs of QuantizeLinear and DequantizeLinear.
_FOREIGN_INT8 = {
    **{"ConvInteger": "Conv", "QLinearConv": "Conv"},
    **{"MatMulInteger": "Gemm", "QLinearMatMul": "Gemm", "QGemm": "Gemm"},
}
_QUANTISES = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", *_FOREIGN_INT8}


def to_fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """FP16 from the picture to the logits; softmax and all outputs stay FP32.

    Args:
        graph: FP32, or FP32 with Q/DQ pairs.

    Returns:
        A new graph; only the conversion of the picture, the outputs' casts back and the softmax
        touch other types.
    """
    half = onnx.ModelProto()
    half.CopyFrom(graph)
    del half.graph.node[:]
    del half.graph.value_info[:]  # types of before; shape inference makes them anew
    for weight in half.graph.initializer:
        _round(weight)
    probabilities = OUTPUTS[1]
    # Names inside of what is FP32 outside; softmax takes the FP32 logits: they sum to one.
    outside = [value.name for value in graph.graph.output if value.name != probabilities]
    inside = {name: f"{name}_fp16" for name in outside}
    (image,) = graph.graph.input
    if image.type.tensor_type.elem_type == TensorProto.FLOAT:
        inside[image.name] = f"{image.name}_fp16"
        half.graph.node.append(_cast(image.name, inside[image.name], TensorProto.FLOAT16))
    for original in graph.graph.node:
        node = half.graph.node.add()
        node.CopyFrom(original)
        if node.output[0] == probabilities:
            continue
        node.input[:] = [inside.get(name, name) for name in node.input]
        node.output[:] = [inside.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16  # of the picture: it holds 0 to 255 exactly
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _round(attribute.t)
        if (name := original.output[0]) in outside:
            half.graph.node.append(_cast(inside[name], name, TensorProto.FLOAT))
    return onnx.shape_inference.infer_shapes(half)


def to_fp32(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with FP32 for FP16: weights and scales are as they are, and nothing overflows.

    Args:
        graph: Of any precision; Q/DQ pairs stay.

    Returns:
        A new graph.
    """
    exact = onnx.ModelProto()
    exact.CopyFrom(graph)
    del exact.graph.value_info[:]  # types of before
    for weight in exact.graph.initializer:
        _widen(weight)
    for node in exact.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
    return exact


@dataclasses.dataclass(frozen=True)
class PrecisionSummary:
    """In which precision a graph's arithmetic runs.

    Attributes:
        convolutions: Number of convolutions per precision (``fp32``, ``fp16``, ``int8``).
        linear: The same for linear layers.
    """

    convolutions: dict[str, int]
    linear: dict[str, int]

    def __str__(self) -> str:
        """Text such as ``66 int8 + 2 fp16 convolutions, 3 int8 linear``."""
        return f"{counted(self.convolutions)} convolutions, {counted(self.linear)} linear"


def counted(counts: Mapping[str, int]) -> str:
    """Text such as ``66 int8 + 2 fp16``."""
    return " + ".join(f"{n} {name}" for name, n in sorted(counts.items()) if n) or "no"


def summarise_precision(graph: onnx.ModelProto) -> PrecisionSummary:
    """Count convolutions and linear layers by the precision that their inputs have.

    A layer counts as INT8 when both its data and its weights come from DequantizeLinear nodes;
    the graph's preprocessing (luminance) is left out.
    """
    inferred = onnx.shape_inference.infer_shapes(graph)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.graph.input}
    types |= {value.name: value.data_type for value in graph.graph.initializer}
    producers = {output: node.op_type for node in graph.graph.node for output in node.output}

    counts: dict[str, Counter[str]] = {operator: Counter() for operator in QUANTISED_OPERATORS}
    for node in graph.graph.node:
        if operator := _FOREIGN_INT8.get(node.op_type):
            counts[operator]["int8"] += 1
    for node in quantisable_layers(graph):
        data, weights = node.input[:2]
        if all(producers.get(name) == "DequantizeLinear" for name in (data, weights)):
            counts[node.op_type]["int8"] += 1
        else:
            kind = types.get(data) or types.get(weights) or 0
            counts[node.op_type][_TYPE_NAMES.get(kind, f"type {kind}")] += 1
    return PrecisionSummary(dict(counts["Conv"]), dict(counts["Gemm"]))


def require_precision(graph: onnx.ModelProto, precision: str, excluded: int, path: object) -> str:
    """Make sure that the graph is what its name says.

    Args:
        graph: The finished graph.
        precision: ``fp32``, ``fp16`` or ``int8``.
        excluded: Number of layers that were left out of INT8 on purpose.
        path: The file, for the error.

    Returns:
        The summary as text.

    Raises:
        ExportError: A convolution or linear layer runs in another precision, or the graph
            contradicts itself.
    """
    try:
        summary = summarise_precision(graph)
    except onnx.shape_inference.InferenceError as error:
        fix = "export it again from the checkpoint"
        raise ExportError(path, "an ONNX graph whose shapes agree", words_of(error), fix) from None
    counts = Counter(summary.convolutions) + Counter(summary.linear)
    others = counts.total() - counts[precision]
    quantised = any(node.op_type in _QUANTISES for node in graph.graph.node)
    wrong = others > excluded if precision == "int8" else others or quantised
    if counts[precision] == 0 or wrong:
        but = f" but {excluded} that were excluded" if precision == "int8" and excluded else ""
        expected = f"all convolutions and linear layers in {precision}{but}"
        found = f"{summary}; it is quantised" if quantised else str(summary)
        fix = "export it again from the checkpoint; if this was just made, report it as a bug"
        raise ExportError(path, expected, found, fix)
    return str(summary)


def require_fp16_range(ranges: dict[str, float], path: object) -> tuple[str, float]:
    """Make sure that every tensor fits FP16 with a margin; finite outputs on a CPU prove nothing.

    Returns:
        The tensor with the largest magnitude, and that magnitude.

    Raises:
        ExportError: A tensor comes within :data:`FP16_MARGIN` of FP16's largest number.
    """
    name = max(ranges, key=ranges.__getitem__)
    if not ranges[name] * FP16_MARGIN < FP16_MAX:
        expected = f"every tensor below {FP16_MAX / FP16_MARGIN:g} for FP16"
        found = f"{ranges[name]:.3g} in {name}"
        raise ExportError(path, expected, found, "export with --precision fp32")
    return name, ranges[name]


def _round(tensor: onnx.TensorProto) -> None:
    """Make a tensor FP16 if it is FP32; what FP16 cannot hold was refused before."""
    if tensor.data_type == TensorProto.FLOAT:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _widen(tensor: onnx.TensorProto) -> None:
    """Make a tensor FP32 if it is FP16."""
    if tensor.data_type == TensorProto.FLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _cast(source: str, result: str, kind: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [result], f"{source}_to_{result}", to=kind)
