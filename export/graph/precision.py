"""Precision is a property of the ONNX graph: FP16 tensors, or INT8 by Q/DQ pairs.

One file then serves ONNX Runtime and TensorRT alike, which builds it strongly typed and decides
nothing by itself.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter

import onnx
from onnx import TensorProto

from efficientface_deploy.errors import ExportError
from efficientface_deploy.workbench.requirements import require_package
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


def to_fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """FP16 from the picture to the logits; softmax and both outputs stay FP32.

    Args:
        graph: FP32, or FP32 with Q/DQ pairs.

    Returns:
        A new graph; only the conversion of the picture, the logits' cast back and the softmax
        touch other types.
    """
    require_package("onnxconverter_common")
    from onnxconverter_common import float16

    with warnings.catch_warnings():
        # Weights below FP16's smallest number become that number; their effect is below rounding.
        warnings.simplefilter("ignore", UserWarning)
        # By default weights above 1e4 would be clipped; what FP16 cannot hold was refused before.
        converted: onnx.ModelProto = float16.convert_float_to_float16(
            _copy(graph), keep_io_types=True, max_finite_val=FP16_MAX
        )
    for node in converted.graph.node:
        if node.op_type == "Cast" and node.input[0] == graph.graph.input[0].name:
            # uint8 goes straight to FP16, which holds 0 to 255 exactly.
            _set_cast_type(node, TensorProto.FLOAT16)
    _softmax_in_fp32(converted)
    del converted.graph.value_info[:]  # types of before; shape inference makes them anew
    return onnx.shape_inference.infer_shapes(converted)


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

        def counted(counts: dict[str, int]) -> str:
            return " + ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "no"

        return f"{counted(self.convolutions)} convolutions, {counted(self.linear)} linear"


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
        ExportError: A convolution or linear layer runs in another precision.
    """
    summary = summarise_precision(graph)
    counts = Counter(summary.convolutions) + Counter(summary.linear)
    others = counts.total() - counts[precision]
    if counts[precision] == 0 or others > (excluded if precision == "int8" else 0):
        but = f" but {excluded} that were excluded" if precision == "int8" and excluded else ""
        raise ExportError(
            path,
            f"all convolutions and linear layers in {precision}{but}",
            str(summary),
            "export it again; if this file was just made, report it as a bug",
        )
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
        raise ExportError(
            path,
            f"every tensor below {FP16_MAX / FP16_MARGIN:g} for FP16",
            f"{ranges[name]:.3g} in {name}",
            "export with --precision fp32",
        )
    return name, ranges[name]


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    duplicate = onnx.ModelProto()
    duplicate.CopyFrom(graph)
    return duplicate


def _set_cast_type(node: onnx.NodeProto, kind: int) -> None:
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("to", kind))


def _softmax_in_fp32(graph: onnx.ModelProto) -> None:
    """Feed softmax from the FP32 logits, so that probabilities sum to one in FP32."""
    nodes = graph.graph.node
    softmax = next(node for node in nodes if node.op_type == "Softmax")
    cast = next(node for node in nodes if softmax.output[0] in node.input)
    softmax.input[0] = "logits"
    softmax.output[0] = cast.output[0]
    nodes.remove(cast)
    nodes.remove(softmax)
    nodes.append(softmax)  # after the cast that makes the logits
