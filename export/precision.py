"""Precision is a property of the ONNX graph: FP16 tensors, or INT8 by Q/DQ pairs.

One file then serves ONNX Runtime and TensorRT alike, which builds it strongly typed and decides
nothing by itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from efficientface_deploy.errors import ExportError

from .packages import require_package

FP16_MAX = 65_504.0
FP16_TINY = 2.0**-24  # the smallest number above zero: a scale must not become zero
# A range measured on some hundred faces will be exceeded by others.
FP16_MARGIN = 4.0
INT8_MAX = 127  # -128 is not used: ranges are symmetric

QUANTISED_OPERATORS = ("Conv", "Gemm")
LUMA = "luma"

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


def quantise(
    graph: onnx.ModelProto, limits: Mapping[str, float], exclude: Collection[str] = ()
) -> onnx.ModelProto:
    """INT8 by symmetric Q/DQ pairs at the inputs of convolutions and linear layers.

    Weights per channel, activations per tensor, biases not quantised, no pair between a
    convolution and its ReLU: what TensorRT 10, 11 and for RTX accept and fuse.

    Args:
        graph: FP32.
        limits: Magnitude that 127 stands for, for each of :func:`quantised_inputs`.
        exclude: Names of layers that stay in higher precision.

    Returns:
        A new graph, FP32 with Q/DQ pairs.

    Raises:
        ExportError: ``exclude`` names something that is not a convolution or linear layer.
    """
    _check_excluded(graph, exclude)
    chosen = {layer.name for layer in quantisable_layers(graph)} - set(exclude)
    quantised = _copy(graph)
    del quantised.graph.node[:]
    pairs = _PairWriter(quantised.graph)
    for node in graph.graph.node:
        if node.name not in chosen:
            quantised.graph.node.append(node)
            continue
        data, weight = node.input[:2]
        inputs = [pairs.activation(data, limits[data]), pairs.weight(weight, _output_axis(node))]
        quantised.graph.node.append(node)
        quantised.graph.node[-1].input[:2] = inputs
    read = {name for node in quantised.graph.node for name in node.input}
    for initializer in list(quantised.graph.initializer):
        if initializer.name not in read:  # FP32 weights that are INT8 now
            quantised.graph.initializer.remove(initializer)
    return quantised


def quantisable_layers(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Convolutions and linear layers of the network, those of its preprocessing left out."""
    preprocessing = _preprocessing_nodes(graph)
    return [
        node
        for node in graph.graph.node
        if node.op_type in QUANTISED_OPERATORS and node.name not in preprocessing
    ]


def quantised_inputs(graph: onnx.ModelProto, exclude: Collection[str] = ()) -> dict[str, list[str]]:
    """The activations that INT8 rounds, each with the names of the layers that read it."""
    readers: dict[str, list[str]] = {}
    for layer in quantisable_layers(graph):
        if layer.name not in exclude:
            readers.setdefault(layer.input[0], []).append(layer.name)
    return readers


class _PairWriter:
    """Appends Q/DQ pairs to a graph, one for each tensor however many layers read it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.weights = {weight.name: weight for weight in graph.initializer}
        self.dequantised: dict[str, str] = {}

    def activation(self, name: str, limit: float) -> str:
        """Round an activation to one scale.

        Returns:
            The name of what it becomes.
        """
        if name not in self.dequantised:
            parameters = self.parameters(name, _scale(np.float32(limit)))
            rounded = f"{name}_quantized"
            self.node("QuantizeLinear", name, [name, *parameters], rounded)
            self.node("DequantizeLinear", name, [rounded, *parameters], f"{name}_dequantized")
            self.dequantised[name] = f"{name}_dequantized"
        return self.dequantised[name]

    def weight(self, name: str, axis: int) -> str:
        """Store a weight as INT8, with a scale for each output channel on ``axis``.

        Returns:
            The name of what it becomes.
        """
        if name not in self.dequantised:
            values = numpy_helper.to_array(self.weights[name])
            others = tuple(other for other in range(values.ndim) if other != axis)
            scale = _scale(np.abs(values).max(axis=others))  # (C,)
            rounded = np.rint(values / np.expand_dims(scale, others)).astype(np.int8)
            parameters = self.parameters(name, scale)
            inputs = [self.array(f"{name}_quantized", rounded), *parameters]
            self.node("DequantizeLinear", name, inputs, f"{name}_dequantized", axis=axis)
            self.dequantised[name] = f"{name}_dequantized"
        return self.dequantised[name]

    def parameters(self, name: str, scale: Any) -> tuple[str, str]:
        zero_point = np.zeros_like(scale, dtype=np.int8)
        return self.array(f"{name}_scale", scale), self.array(f"{name}_zero_point", zero_point)

    def array(self, name: str, values: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(
        self, operator: str, name: str, inputs: Sequence[str], output: str, **attributes: Any
    ) -> None:
        named = f"{name}_{operator}"
        self.graph.node.append(
            onnx.helper.make_node(operator, inputs, [output], named, **attributes)
        )


def _scale(magnitude: Any) -> Any:
    """What one step of INT8 is worth; what was always zero keeps a range of 1."""
    step = np.where(magnitude > 0, magnitude, 1) / INT8_MAX
    return np.maximum(step, FP16_TINY).astype(np.float32)


def _output_axis(layer: onnx.NodeProto) -> int:
    """Axis of a layer's weights that its output channels lie on."""
    transposed = any(a.name == "transB" and a.i for a in layer.attribute)
    return 0 if layer.op_type == "Conv" or transposed else 1


def _check_excluded(graph: onnx.ModelProto, exclude: Collection[str]) -> None:
    layers = [layer.name for layer in quantisable_layers(graph)]
    if unknown := [name for name in exclude if name not in layers]:
        near = difflib.get_close_matches(unknown[0], layers, n=3) or layers[:3]
        raise ExportError(
            "--exclude",
            expected="names of convolutions or linear layers, such as " + ", ".join(near),
            found=", ".join(unknown),
            fix="look them up in the FP32 ONNX file, e.g. with Netron",
        )


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
            expected=f"all convolutions and linear layers in {precision}{but}",
            found=str(summary),
            fix="export it again; if this file was just made, report it as a bug",
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
            expected=f"every tensor below {FP16_MAX / FP16_MARGIN:g} for FP16",
            found=f"{ranges[name]:.3g} in {name}",
            fix="export with --precision fp32",
        )
    return name, ranges[name]


def _preprocessing_nodes(graph: onnx.ModelProto) -> list[str]:
    """Convolutions that make luminance of colour: not the network's, and not to be rounded."""
    return [
        node.name
        for node in graph.graph.node
        if node.op_type == "Conv" and node.input[1].endswith(LUMA)
    ]


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
