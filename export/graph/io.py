"""Reading and writing our ONNX files; no torch and no runtime needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from efficientface_deploy.artifact import (
    FEATURES,
    OUTPUTS,
    PROBE_KEY,
    PROVENANCE_KEY,
    SPEC_KEY,
    external_files,
    provenance_from_metadata,
    spec_from_metadata,
)
from efficientface_deploy.errors import ArtifactError, ExportError
from efficientface_deploy.files import atomic_path, require_file
from efficientface_deploy.probe import Probe
from efficientface_deploy.spec import ModelSpec

# Opset 19 is the first whose QuantizeLinear takes FP16; TensorRT 10 and ONNX Runtime 1.16 read it.
OPSET = 19
IR_VERSION = 9  # the oldest that knows opset 19, for the runtimes of older devices

# What may stand between a stored weight and the layer that uses it.
_KEEP_SHAPE = ("QuantizeLinear", "DequantizeLinear", "Cast")


class OnnxFile(NamedTuple):
    """What an ONNX file of ours holds.

    Attributes:
        graph: The graph, not to be changed.
        spec: The model's.
        provenance: How it was made.
        probe: What it must give; None where it does not say.
    """

    graph: onnx.ModelProto
    spec: ModelSpec
    provenance: Mapping[str, Any]
    probe: Probe | None = None


def read_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file of ours.

    Args:
        path: ``*.onnx``.

    Raises:
        ArtifactError: The file is not ONNX, or not of ours.
        SpecError: Its spec is damaged.
    """
    path = require_file(path, "an ONNX model")
    try:
        if external_files(path):
            raise DecodeError("its weights are in other files")
        graph = onnx.load(path, load_external_data=False)
        metadata = {prop.key: prop.value for prop in graph.metadata_props}
        if not graph.graph.node:
            raise DecodeError("no nodes")
    except (DecodeError, ValueError, OSError) as error:
        found = f"a damaged or foreign file ({error})"
        raise ArtifactError(path, "an ONNX model", found, "export it again") from None
    spec, provenance = spec_from_metadata(metadata, path), provenance_from_metadata(metadata, path)
    probe = Probe.from_text(metadata.get(PROBE_KEY), path, spec.num_classes)
    return OnnxFile(graph, spec, provenance, probe)


def write_onnx(
    graph: onnx.ModelProto,
    path: str | Path,
    spec: ModelSpec,
    provenance: Mapping[str, Any],
    probe: Probe | None = None,
) -> None:
    """Check a graph and write it, atomically, with spec and provenance in its metadata.

    Args:
        graph: The graph; metadata that it has is left out.
        path: Target.
        spec: The model's spec.
        provenance: How it was made, values that JSON holds.
        probe: What it must give where it is loaded.

    Raises:
        ExportError: The graph is not valid ONNX.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    metadata = {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: json.dumps(dict(provenance))}
    if probe is not None:
        metadata[PROBE_KEY] = json.dumps(probe.record())
    onnx.helper.set_model_props(model, metadata)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        found = str(error).strip().splitlines()[0]
        fix = "report this with the versions of torch and onnx"
        raise ExportError(path, "a valid ONNX graph", found, fix) from None
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def with_features(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with a third output, ``features``: what the last layer is given.

    Args:
        graph: FP32, with a linear layer that makes the logits.

    Returns:
        A new graph.
    """
    found = onnx.ModelProto()
    found.CopyFrom(graph)
    (head,) = (node for node in found.graph.node if OUTPUTS[0] in node.output)
    before, weight = head.input[0], head.input[1]
    for node in found.graph.node:
        for names in (node.input, node.output):
            names[:] = [FEATURES if name == before else name for name in names]
    for value in [one for one in found.graph.value_info if one.name == before]:
        found.graph.value_info.remove(value)
    (shape,) = (list(one.dims) for one in found.graph.initializer if one.name == weight)
    transposed = any(one.name == "transB" and one.i for one in head.attribute)
    batch = found.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    found.graph.output.append(
        onnx.helper.make_tensor_value_info(
            FEATURES, onnx.TensorProto.FLOAT, [batch, shape[1 if transposed else 0]]
        )
    )
    return found


def multiply_adds(graph: onnx.ModelProto) -> int:
    """Multiply-adds of the convolutions and linear layers for one image, zero weights included.

    Args:
        graph: Of any precision, Q/DQ pairs included; but for the batch, all shapes are known.
    """
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in [*inferred.value_info, *inferred.output]
    }
    weights = {weight.name: list(weight.dims) for weight in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type in _KEEP_SHAPE and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
    total = 0
    for node in graph.graph.node:
        if node.op_type == "Conv":  # weight (out, in / groups, kH, kW), output (N, out, H, W)
            total += int(np.prod(weights[node.input[1]]) * np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "Gemm":
            total += int(np.prod(weights[node.input[1]]))
    return total
