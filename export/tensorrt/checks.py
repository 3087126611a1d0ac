"""What a graph must be before TensorRT builds it, and what must have come of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from efficientface_deploy.errors import ExportError
from efficientface_export.graph.precision import counted, summarise_precision
from efficientface_export.tensorrt.build_log import Layer


def check_batch(graph: onnx.ModelProto, path: Path) -> None:
    """Refuse a graph whose batch, or anything but the batch, does not fit a profile.

    Raises:
        ExportError: The batch is fixed, or another dimension is not.
    """
    image = graph.graph.input[0]
    dims = image.type.tensor_type.shape.dim
    shape = [dim.dim_value or dim.dim_param or "?" for dim in dims]
    if [isinstance(size, int) for size in shape] != [False, True, True, True]:
        expected = "an input whose batch, and nothing else, is dynamic"
        found = f"{image.name} of shape ({', '.join(map(str, shape))})"
        fix = "export the ONNX file again with efficientface-export"
        raise ExportError(path, expected, found, fix)


def check_scheme(graph: onnx.ModelProto, path: Path) -> None:
    """Refuse INT8 as ONNX Runtime's CPU wants it.

    Raises:
        ExportError: Activations are uint8.
    """
    types = {weight.name: weight.data_type for weight in graph.graph.initializer}
    for node in graph.graph.node:
        rounds = node.op_type == "QuantizeLinear"
        if rounds and TensorProto.UINT8 in map(types.get, node.input[2:]):
            expected = "INT8 for a GPU, with activations of int8"
            found = "INT8 for a CPU, with activations of uint8"
            fix = "export it from the checkpoint or the FP32 file with --target gpu"
            raise ExportError(path, expected, found, fix)


def check_turing(graph: onnx.ModelProto, kind: str, built_for: Sequence[str], path: Path) -> None:
    """Say what TensorRT for RTX cannot do on Turing before it tries: all but FP16 (seen with 1.7).

    Raises:
        ExportError: The graph is for SM75 and not FP16.
    """
    if kind != "trt-rtx" or "sm75" not in built_for:
        return
    summary = summarise_precision(graph)
    if {*summary.convolutions, *summary.linear} - {"fp16"}:
        expected = (
            "an FP16 graph for sm75, where TensorRT for RTX has no FP32 or BF16 matrix "
            "products and emulates INT8"
        )
        fix = "build for sm75 with --precision fp16, or leave sm75 out"
        raise ExportError(path, expected, str(summary), fix)


def check_network(graph: onnx.ModelProto, network: Mapping[str, int], path: Path) -> dict[str, int]:
    """Hold what the parser made of a graph against the graph: convolutions per precision.

    The network is strongly typed, so that its types are those of the engine. FLOAT is not told from
    FP16 where a network has no other type: it is also what a tensor says whose type was never
    inferred, and which releases infer it before the build is known of TensorRT for RTX alone.

    Args:
        graph: The graph.
        network: Number of convolutions per precision in the network.
        path: The graph's file, for errors.

    Returns:
        Number of convolutions per precision in the graph, without those of the preprocessing.

    Raises:
        ExportError: The two differ.
    """
    asked, found = _asked(graph), Counter(network)
    wanted = asked
    if found.keys() <= {"fp32", "int8"}:
        wanted = Counter(int8=asked["int8"], fp32=asked.total() - asked["int8"])
    if wanted - found or (found - wanted).total() != _preprocessing(graph):
        expected = f"a network with {counted(asked)} convolutions, as in the graph"
        fix = "export the ONNX file again with this version, or keep to --engine onnx"
        raise ExportError(path, expected, f"{counted(found)} after parsing", fix)
    return dict(sorted(asked.items()))


def check_log(graph: onnx.ModelProto, layers: Sequence[Layer], path: Path) -> dict[str, int]:
    """Let the builder's log contradict the network; it may be silent.

    It is a witness and no more: a release need not list its layers, TensorRT leaves out the types
    of what depends on a dynamic batch, and a convolution may hide in a layer of another name. What
    contradicts is a convolution in a precision that the graph has nowhere (but for those of the
    preprocessing, which the summary leaves out), or so many in others that fewer than half are left
    for the one that most have: fusions change the numbers a little.

    Args:
        graph: The graph.
        layers: Those of the finished engine.
        path: The graph's file, for errors.

    Returns:
        Number of convolutions per precision that the log gives; empty where it gives none.

    Raises:
        ExportError: Another precision was built.
    """
    asked, preprocessing = _asked(graph), _preprocessing(graph)
    seen = Counter(layer.precision for layer in layers if layer.is_convolution and layer.precision)
    most, count = asked.most_common(1)[0] if asked else ("", 0)
    unasked = sum(number for name, number in seen.items() if not asked[name])
    others = seen.total() - seen[most]
    if unasked > preprocessing or others > asked.total() + preprocessing - count / 2:
        expected = f"an engine with {counted(asked)} convolutions, as in the graph"
        fix = "build for other GPUs (--compute-capability) or in another --precision"
        raise ExportError(path, expected, f"{counted(seen)} in the builder's log", fix)
    return dict(sorted(seen.items()))


def _asked(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(summarise_precision(graph).convolutions)


def _preprocessing(graph: onnx.ModelProto) -> int:
    """Number of convolutions that the summary leaves out."""
    operators = Counter(node.op_type for node in graph.graph.node)
    return operators["Conv"] - _asked(graph).total()
