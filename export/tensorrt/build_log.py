"""What TensorRT's log says of a build: layers, precisions, why it failed."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import onnx

from efficientface_deploy.backends.tensorrt.library import is_echo

# Layers of the finished engine that launch nothing: shapes, and waiting between streams.
_NO_KERNEL = frozenset({"shape_call", "signal", "wait", "NoOp", "Constant"})
_LISTINGS = ("Layers:", "Engine Layer Information:")  # newer and older TensorRT 10
_LAYER = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<type>[^,]+), Inputs: \[(?P<inputs>.*)")
_TYPE = r"\b(Float|FP32|Half|FP16|BFloat16|BF16|Int8|FP8)\b"
_DATATYPE = re.compile(rf"Datatype: [^}}\]]*?{_TYPE}")
_WEIGHTS = re.compile(rf'Weights: {{"Type": "{_TYPE}"')
_TENSOR = re.compile(
    r"{ Name: [^}]*?Dimensions: \[(?P<sizes>[-\d,]*)\][^}]*?Datatype: (?P<type>\w+)"
)
_COUNTED = re.compile(r'{"Type": "(?P<type>\w+)", "Count": (?P<count>\d+)}')
_BYTES = {
    **{"Float": 4, "FP32": 4, "Half": 2, "FP16": 2, "BFloat16": 2, "BF16": 2},
    **{"Int8": 1, "UInt8": 1, "Bool": 1, "FP8": 1, "Int32": 4, "Int64": 8},
}
# The short form, where a release does not list the details that were asked for.
_SHORT_LAYER = re.compile(
    r"^Layer\((?P<type>\w+)\): (?P<name>.+?), Tactic: [^,]*, (?P<data>.*?) -> "
)
_SHORT_DATATYPE = re.compile(rf"{_TYPE}[\[(]")
_PRECISIONS = {
    "Float": "fp32",
    "FP32": "fp32",
    "Half": "fp16",
    "FP16": "fp16",
    "BFloat16": "bf16",
    "BF16": "bf16",
    "Int8": "int8",
    "FP8": "fp8",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the finished engine.

    Attributes:
        name: As the builder names it.
        type: As the builder names it, e.g. ``correlation`` for a convolution.
        precision: Of its first input: ``fp32``, ``fp16``, ``int8``, ...; of its weights where the
            log leaves the inputs' types out, as TensorRT does for a dynamic batch; empty where
            neither is said, or for another type, such as uint8.
        activations: Bytes that it reads and writes for one picture, without its constants; None
            where the log does not give every size and type.
        constants: Bytes of its weights, biases and scales; None as above.
    """

    name: str
    type: str
    precision: str
    activations: int | None = None
    constants: int | None = None

    @property
    def is_kernel(self) -> bool:
        """Whether the layer launches a kernel."""
        return self.type not in _NO_KERNEL

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a convolution, alone or with what was fused to it."""
        if self.type == "runtime_fusion":  # of several kinds; the name says which: CorrRelu, FcAdd
            return "Corr" in self.name or "Conv" in self.name
        return "conv" in self.type.lower() or self.type == "correlation"


@dataclasses.dataclass(frozen=True)
class EngineCost:
    """What one inference of one picture costs in launches and memory traffic: counts, not times.

    Attributes:
        kernels: Number of kernels that are launched.
        activations: Bytes that kernels read and write between them, a tensor counting once for
            each kernel that touches it; what is sliced counts whole. None where the log does not
            give every size and type, as TensorRT's does not for a dynamic batch.
        constants: Bytes of weights, biases and scales that they read; None as above.
    """

    kernels: int
    activations: int | None
    constants: int | None

    @property
    def bytes_moved(self) -> int | None:
        """Of activations and constants together; None where the log does not say."""
        if self.activations is None or self.constants is None:
            return None
        return self.activations + self.constants

    def exceeds(self, other: EngineCost) -> bool:
        """Whether it launches more kernels, or moves more bytes where both are known."""
        own, theirs = self.bytes_moved, other.bytes_moved
        moves_more = own is not None and theirs is not None and own > theirs
        return self.kernels > other.kernels or moves_more

    def __str__(self) -> str:
        """Text such as ``79 kernels, 7.8 MB moved``."""
        moved = self.bytes_moved
        return f"{self.kernels} kernels" + (f", {moved / 1e6:.1f} MB moved" if moved else "")


def engine_cost(layers: Sequence[Layer]) -> EngineCost | None:
    """Count the kernels of an engine, and the bytes that they move; None for a log without layers.

    Args:
        layers: As :func:`parse_layers` gives them.
    """
    kernels = [layer for layer in layers if layer.is_kernel]
    activations = _total(layer.activations for layer in kernels)
    constants = _total(layer.constants for layer in kernels)
    return EngineCost(len(kernels), activations, constants) if layers else None


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum, or None where one is not known."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def parse_layers(messages: Sequence[str]) -> tuple[Layer, ...]:
    """Read the layers of the finished engine from a verbose build log.

    With ``ProfilingVerbosity.DETAILED`` the library ends a build by listing them, one a line, in
    the words of its engine inspector; TensorRT and TensorRT for RTX share them.

    Args:
        messages: The log, a message an element.

    Returns:
        The layers of the last listing; empty when there is none.
    """
    listings = [message for message in messages if message.lstrip().startswith(_LISTINGS)]
    lines = listings[-1].splitlines() if listings else []
    return tuple(layer for line in lines if (layer := _parse_layer(line.strip())))


def _parse_layer(line: str) -> Layer | None:
    activations = constants = None
    if match := _LAYER.match(line):
        # The first input is the data; constants, scales and outputs follow.
        data = match["inputs"].partition("}")[0]
        datatype = _DATATYPE.search(data) or _WEIGHTS.search(match["inputs"])
        activations, constants = _traffic(match["inputs"])
    elif match := _SHORT_LAYER.match(line):
        datatype = _SHORT_DATATYPE.search(match["data"])
    else:
        return None
    precision = _PRECISIONS[datatype[1]] if datatype else ""
    return Layer(match["name"], match["type"], precision, activations, constants)


def _traffic(tensors: str) -> tuple[int | None, int | None]:
    """Bytes of the tensors of a line, and of its constants; None where one is not known.

    TensorRT for RTX lists constants as tensors between the inputs and the outputs, TensorRT by type
    and count behind the outputs.
    """
    inputs, _, outputs = tensors.partition("Outputs: [")
    inputs, _, constants = inputs.partition("Constants: [")
    counted = _total(
        size and size * int(match["count"])
        for match in _COUNTED.finditer(tensors)
        for size in [_BYTES.get(match["type"])]
    )
    return _total(map(_bytes_of, (inputs, outputs))), _total((_bytes_of(constants), counted))


def _bytes_of(tensors: str) -> int | None:
    """Bytes of the tensors in a list, for a batch of one; None where one is not known."""
    found = list(_TENSOR.finditer(tensors))
    if len(found) < tensors.count("{ Name: ") or any(m["type"] not in _BYTES for m in found):
        return None
    return sum(_BYTES[m["type"]] * _elements(m["sizes"]) for m in found)


def _elements(sizes: str) -> int:
    """Product of the sizes, that of a dynamic batch, -1, counting as one."""
    return math.prod(abs(int(size)) for size in sizes.split(",") if size)


def builder_reason(records: Sequence[tuple[int, str]], graph: onnx.ModelProto) -> str:
    """The first error of a build, after the ONNX node that it or another error speaks of."""
    errors = [text for level, text in records if level == logging.ERROR]
    causes = [text for text in errors if not is_echo(text)] or errors
    if not causes:
        return "no reason given"
    reason = " ".join(causes[0].split())[:300]
    operators = {node.name: node.op_type for node in graph.graph.node if node.name}
    for text in causes:
        named = [name for name in operators if _names(text, name)]
        if named:
            first = min(named, key=lambda name: (text.find(name), -len(name)))
            return f"{operators[first]} node {first}: {reason}"
    return reason


def builder_fix(records: Sequence[tuple[int, str]], graph: onnx.ModelProto) -> str:
    """What to do about a build that failed.

    Where the builder has no kernel for an INT8 layer, as for depthwise convolutions on Orin, it is
    that layer which INT8 has to leave out; where it had no room to try one, it wants more.
    """
    makers = {output: node.op_type for node in graph.graph.node for output in node.output}
    layers = [
        node.name
        for node in graph.graph.node
        if [makers.get(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
    ]
    texts = [text for _, text in records]
    if any("insufficient memory" in text for text in texts):
        return "give the builder more memory with --workspace, or keep to --engine onnx"
    without = "\n".join(t for t in texts if "could not find any implementation" in t.lower())
    if named := [name for name in layers if name and _names(without, name)]:
        source = "from the checkpoint or the FP32 file"
        return f"make the INT8 file again, {source}, with --exclude {' '.join(named)}"
    return "try another --precision or --workspace, or keep to --engine onnx"


def _names(text: str, node: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(node)}(?!\w)", text) is not None


def parser_reason(error: Any) -> str:
    """The node that the parser stumbled over, and why, in one line."""
    lines = [line for line in error.desc().splitlines() if not is_echo(line)]
    node = " ".join(text for text in (error.node_operator(), error.node_name()) if text)
    return f"{node} node: {' '.join(lines)}" if node else " ".join(lines)
