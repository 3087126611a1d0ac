"""An engine whose answers are known: logits[n, c] = mean of image n + c."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tensorrt_stand_in import Library, make_plan

from efficientface_deploy.artifact import write_sidecar
from efficientface_deploy.files import file_hash
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import UInt8Array


def expected_logits(images: np.ndarray) -> np.ndarray:
    means = images.astype(np.float32).mean(axis=(1, 2, 3)) / 255  # (N,)
    return (means[:, None] + np.arange(7, dtype=np.float32)).astype(np.float32)  # (N, 7)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def mean_graph(
    side: int = 64,
    classes: int = 7,
    logits: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("logits", "probabilities"),
    float_input: bool = False,
) -> onnx.ModelProto:
    """logits[n, c] = mean of image n + c, as in :func:`expected_logits`."""
    scale = numpy_helper.from_array(np.float32(1 / 255), "scale")
    steps = numpy_helper.from_array(np.arange(classes, dtype=np.float32)[None], "steps")
    axes = numpy_helper.from_array(np.array([1, 2, 3]), "axes")
    image = ("input", TensorProto.FLOAT, ["N", 3, side, side])
    if not float_input:
        image = ("image", TensorProto.UINT8, ["N", side, side, 3])
    nodes = [
        helper.make_node("Cast", [image[0]], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled", "axes"], ["means"], keepdims=0),
        helper.make_node("Unsqueeze", ["means", "one"], ["column"]),
        helper.make_node("Add", ["column", "steps"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["logits"], to=logits),
        helper.make_node("Softmax", ["sum"], ["probabilities"], axis=1),
        helper.make_node("Identity", ["sum"], ["extra"]),
        helper.make_node("Identity", ["sum"], ["features"]),
    ]
    one = numpy_helper.from_array(np.array([1]), "one")
    values = [
        helper.make_tensor_value_info(
            name, logits if name == "logits" else TensorProto.FLOAT, ["N", classes]
        )
        for name in outputs
    ]
    inputs = [helper.make_tensor_value_info(*image)]
    graph = helper.make_graph(nodes, "mean", inputs, values, [scale, steps, axes, one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def write_plan(
    path: Path, spec: ModelSpec, library: Library, max_batch: int = 4, **changes: Any
) -> None:
    """An engine of batches up to ``max_batch``, and its sidecar."""
    graph = mean_graph(**changes)
    item = [dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim[1:]]
    path.write_bytes(make_plan(graph, [(1, *item), (1, *item), (max_batch, *item)]))
    module = library.module
    write_record(path, spec, library=module.__name__, version=module.__version__)


def write_record(path: Path, spec: ModelSpec, **changes: Any) -> None:
    record = {
        "sha256": file_hash(path),
        "library": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": ["sm86"],
        "parent": "model.onnx",
        "max_batch": 4,
    }
    write_sidecar(path, spec, {"precision": "fp16", "engine": record | changes})


def images(count: int, seed: int = 0) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
