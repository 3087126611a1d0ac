"""INT8 by pairs of QuantizeLinear and DequantizeLinear, placed as a kind of processor wants them.

For GPUs, what TensorRT 10, 11 and for RTX accept and fuse: symmetric int8, pairs at the inputs of
convolutions and linear layers, none between a convolution and its ReLU. Which layers these are, and
why some have one scale for all weights, is in :mod:`.placement`.

For CPUs, what ONNX Runtime turns into integer convolutions. It does so only where inputs and output
are rounded, and drops a ReLU only where the smallest value stands for zero: so activations are
uint8, and every tensor between two layers is rounded, also where it is only moved. Before VNNI, x86
adds two products of uint8 and int8 in 16 bits: weights of 7 bits are exact there (ONNX Runtime's
manual calls it ``reduce_range``).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from efficientface_deploy.errors import ExportError

QUANTISED_OPERATORS = ("Conv", "Gemm")
LUMA = "luma"
FP16_TINY = 2.0**-24  # FP16's smallest number above zero: a scale must not become zero

# What gives out nothing but values that it got.
_MOVERS = ("Concat", "Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose")
_NEVER_NEGATIVE = ("Relu", "Sigmoid", "Softmax")
_KEEPS_SIGNS = (*_MOVERS, "Add", "AveragePool", "GlobalAveragePool", "Mul")


@dataclasses.dataclass(frozen=True)
class QuantisationScheme:
    """How a kind of processor wants INT8.

    Attributes:
        unsigned: Activations are uint8, from zero on where they cannot be negative.
        everywhere: Tensors between layers are rounded where they are made, and once for all that
            read them; else at the inputs of layers alone.
        fused: One scale for all weights of a layer that a ReLU and a depthwise convolution follow,
            as :func:`.placement.lay_out_for_gpu` prepares them; else one for each output channel.
        weight_max: Largest magnitude of a weight.
    """

    unsigned: bool
    everywhere: bool
    fused: bool
    weight_max: int


# -128 is not used: ranges of weights are symmetric.
SCHEMES = {
    "cpu": QuantisationScheme(unsigned=True, everywhere=True, fused=False, weight_max=64),
    "gpu": QuantisationScheme(unsigned=False, everywhere=False, fused=True, weight_max=127),
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Activations that are rounded with one scale.

    Attributes:
        tensors: Their names.
        layers: Layers that must stay in higher precision for these not to be rounded: those that
            read them, or where no layer does, those that make them.
    """

    tensors: tuple[str, ...]
    layers: tuple[str, ...]


def quantise(
    graph: onnx.ModelProto,
    amax: Mapping[str, float],
    scheme: QuantisationScheme,
    exclude: Collection[str] = (),
) -> onnx.ModelProto:
    """INT8 by Q/DQ pairs; biases are not quantised.

    Args:
        graph: FP32.
        amax: Magnitude that the largest value stands for, for each tensor of
            :func:`quantised_groups`.
        scheme: Where the pairs go and what is between them.
        exclude: Names of layers that stay in higher precision.

    Returns:
        A new graph, FP32 with Q/DQ pairs.

    Raises:
        ExportError: ``exclude`` names something that is not a convolution or linear layer.
    """
    _check_excluded(graph, exclude)
    chosen = {layer.name for layer in quantisable_layers(graph)} - set(exclude)
    largest = {
        name: max(amax[member] for member in group.tensors)
        for group in quantised_groups(graph, scheme, exclude)
        for name in group.tensors
    }
    quantised = onnx.ModelProto()
    quantised.CopyFrom(graph)
    del quantised.graph.node[:]
    pairs = _PairWriter(quantised.graph, scheme, _never_negative(graph))
    for node in graph.graph.node:
        is_chosen = node.name in chosen
        inputs = [
            pairs.activation(name, largest[name])
            if name in largest and (is_chosen or scheme.everywhere)
            else name
            for name in node.input
        ]
        if is_chosen:
            shares = scheme.fused and depthwise_behind(graph, node) is not None
            inputs[1] = pairs.weight(node.input[1], None if shares else _output_axis(node))
        quantised.graph.node.append(node)
        quantised.graph.node[-1].input[:] = inputs
    read = {name for node in quantised.graph.node for name in node.input}
    for initializer in list(quantised.graph.initializer):
        if initializer.name not in read:  # FP32 weights that are INT8 now
            quantised.graph.initializer.remove(initializer)
    return quantised


def quantisable_layers(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Convolutions and linear layers of the network, those of its preprocessing left out.

    Convolutions that make luminance of colour are not the network's, and not to be rounded.
    """
    return [
        node
        for node in graph.graph.node
        if node.op_type in QUANTISED_OPERATORS and not node.input[1].endswith(LUMA)
    ]


def groups_of(layer: onnx.NodeProto) -> int:
    """Number of groups of a convolution; 1 for a linear layer."""
    return next((a.i for a in layer.attribute if a.name == "group"), 1)


def depthwise_behind(graph: onnx.ModelProto, layer: onnx.NodeProto) -> onnx.NodeProto | None:
    """The depthwise convolution that alone reads a layer's result, through a ReLU, or None."""
    outputs = {value.name for value in graph.graph.output}
    sizes = {weight.name: weight.dims for weight in graph.graph.initializer}
    found = layer
    for operator in ("Relu", "Conv"):
        (name,) = found.output
        readers = [node for node in graph.graph.node if name in node.input]
        if name in outputs or [node.op_type for node in readers] != [operator]:
            return None
        (found,) = readers
    return found if groups_of(found) == sizes[layer.input[1]][_output_axis(layer)] else None


def quantised_groups(
    graph: onnx.ModelProto, scheme: QuantisationScheme, exclude: Collection[str] = ()
) -> list[Group]:
    """The activations that INT8 rounds."""
    layers = quantisable_layers(graph)
    readers = [(layer.input[0], layer.name) for layer in layers]
    makers: list[tuple[str, str]] = []
    together = [[name] for name in dict.fromkeys(name for name, _ in readers)]
    if scheme.everywhere:
        makers = [(name, layer.name) for layer in layers for name in _result(graph, layer)]
        names = dict.fromkeys(name for name, _ in (*readers, *makers))
        together = _moved_together(graph, list(names))
    groups = [
        Group(tuple(tensors), _layers_of(tensors, readers) or _layers_of(tensors, makers))
        for tensors in together
    ]
    return [group for group in groups if not set(group.layers) <= set(exclude)]


def _layers_of(tensors: Sequence[str], layers: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(layer for tensor, layer in layers if tensor in tensors)


def _result(graph: onnx.ModelProto, layer: onnx.NodeProto) -> list[str]:
    """What a layer gives, after its ReLU; nothing where that is a result of the network."""
    (name,) = layer.output
    followers = [node for node in graph.graph.node if name in node.input]
    if [node.op_type for node in followers] == ["Relu"]:
        (name,) = followers[0].output
    outputs = {value.name for value in graph.graph.output}
    return [] if name in outputs else [name]


def _moved_together(graph: onnx.ModelProto, names: Sequence[str]) -> list[list[str]]:
    """Tensors among which values are only moved, in groups: ``names`` and their company."""
    group_of: dict[str, list[str]] = {name: [name] for name in names}
    for node in graph.graph.node:
        if node.op_type not in _MOVERS:
            continue
        # Of Reshape, Slice and Split only the first input is data.
        data = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
        merged: list[str] = []
        for name in [*data, *node.output]:
            members = group_of.get(name, [name])
            merged += [member for member in members if member not in merged]
        for member in merged:
            group_of[member] = merged
    kept = {id(group_of[name]): group_of[name] for name in names}
    return list(kept.values())


def _never_negative(graph: onnx.ModelProto) -> set[str]:
    """Tensors that have no negative values, whatever the picture."""
    found: set[str] = set()
    for node in graph.graph.node:
        data = node.input[:1] if node.op_type in ("Reshape", "Slice", "Split") else node.input
        keeps = node.op_type in _KEEPS_SIGNS and found.issuperset(data)
        if node.op_type in _NEVER_NEGATIVE or keeps:
            found.update(node.output)
    return found


class _PairWriter:
    """Appends Q/DQ pairs to a graph, one for each tensor however many nodes read it."""

    def __init__(
        self, graph: onnx.GraphProto, scheme: QuantisationScheme, never_negative: Collection[str]
    ) -> None:
        self.graph = graph
        self.scheme = scheme
        self.never_negative = never_negative
        self.weights = {weight.name: weight for weight in graph.initializer}
        self.dequantised: dict[str, str] = {}

    def activation(self, name: str, amax: float) -> str:
        """Round an activation to one scale.

        Returns:
            The name of what it becomes.
        """
        if name not in self.dequantised:
            zero_point: np.int8 | np.uint8
            if not self.scheme.unsigned:
                steps, zero_point = 127, np.int8(0)
            elif name in self.never_negative:
                steps, zero_point = 255, np.uint8(0)
            else:
                steps, zero_point = 127, np.uint8(128)
            parameters = self.parameters(name, _scale(np.float32(amax), steps), zero_point)
            rounded = f"{name}_quantized"
            self.node("QuantizeLinear", name, [name, *parameters], rounded)
            self.node("DequantizeLinear", name, [rounded, *parameters], f"{name}_dequantized")
            self.dequantised[name] = f"{name}_dequantized"
        return self.dequantised[name]

    def weight(self, name: str, axis: int | None) -> str:
        """Store a weight as INT8, with one scale, or one for each output channel on ``axis``.

        Returns:
            The name of what it becomes.
        """
        if name not in self.dequantised:
            values = numpy_helper.to_array(self.weights[name])
            others = tuple(other for other in range(values.ndim) if other != axis)
            scale = _scale(np.abs(values).max(axis=others), self.scheme.weight_max)  # (C,) or ()
            steps = scale if axis is None else np.expand_dims(scale, others)
            rounded = np.rint(values / steps).astype(np.int8)
            parameters = self.parameters(name, scale, np.zeros_like(scale, dtype=np.int8))
            inputs = [self.array(f"{name}_quantized", rounded), *parameters]
            on = {} if axis is None else {"axis": axis}
            self.node("DequantizeLinear", name, inputs, f"{name}_dequantized", **on)
            self.dequantised[name] = f"{name}_dequantized"
        return self.dequantised[name]

    def parameters(self, name: str, scale: Any, zero_point: Any) -> tuple[str, str]:
        return self.array(f"{name}_scale", scale), self.array(f"{name}_zero_point", zero_point)

    def array(self, name: str, values: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(
        self, operator: str, name: str, inputs: Sequence[str], output: str, **attributes: Any
    ) -> None:
        named = f"{name}_{operator}"
        node = onnx.helper.make_node(operator, inputs, [output], named, **attributes)
        self.graph.node.append(node)


def _scale(magnitude: Any, steps: int) -> Any:
    """What one of ``steps`` is worth; what was always zero keeps a range of 1."""
    step = np.where(magnitude > 0, magnitude, 1) / steps
    return np.maximum(step, FP16_TINY).astype(np.float32)


def _output_axis(layer: onnx.NodeProto) -> int:
    """Axis of a layer's weights that its output channels lie on."""
    transposed = any(a.name == "transB" and a.i for a in layer.attribute)
    return 0 if layer.op_type == "Conv" or transposed else 1


def _check_excluded(graph: onnx.ModelProto, exclude: Collection[str]) -> None:
    layers = [layer.name for layer in quantisable_layers(graph)]
    if unknown := [name for name in exclude if name not in layers]:
        near = difflib.get_close_matches(unknown[0], layers, n=3) or layers[:3]
        expected = "names of convolutions or linear layers, such as " + ", ".join(near)
        fix = "look them up in the FP32 ONNX file, e.g. with Netron"
        raise ExportError("--exclude", expected, ", ".join(unknown), fix)
