"""What a graph must be before TensorRT builds it, and what must have come of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


def check_precisions(
    graph: onnx.ModelProto, layers: Sequence[Layer], kind: str, path: Path
) -> dict[str, int]:
    """Hold what was built against the graph: convolutions per precision.

    Fusions change the number of convolutions a little, so that half of them is enough for the
    precision that most have; one that the graph has nowhere is too many, but for convolutions of
    the preprocessing, which the summary leaves out.

    Raises:
        ExportError: Another precision was built, or TensorRT for RTX lists no convolution.
    """
    asked = Counter(summarise_precision(graph).convolutions)
    built = Counter(layer.precision for layer in layers if layer.is_convolution)
    if not built and kind == "trt":
        return {}  # older TensorRT 10 lists nothing; there the strongly typed graph is the check
    preprocessing = sum(node.op_type == "Conv" for node in graph.graph.node) - asked.total()
    unasked = sum(count for name, count in built.items() if not asked[name])
    most, count = asked.most_common(1)[0] if asked else ("", 0)
    if unasked > preprocessing or built[most] < count / 2:
        expected = f"an engine with {counted(asked)} convolutions, as in the graph"
        found = f"{counted(built)} in the builder's log"
        fix = "build for other GPUs (--compute-capability) or in another --precision"
        raise ExportError(path, expected, found, fix)
    return dict(sorted(built.items()))
