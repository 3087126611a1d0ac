"""Where the time goes inside a network: operators by kind and by layer.

ONNX Runtime's own profiler, on the session that the runtime itself makes. It takes a time stamp
around every node, which costs a few microseconds each: the sum is longer than the time without it,
and small nodes are made to look dearer than they are. Of an engine the layers are listed, by
TensorRT's inspector; it says what they are, not how long they take.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.models import Candidate
from benchmarks.measure.sessions import profiled
from efficientface_deploy.backends.tensorrt.library import load_library, make_logger
from efficientface_deploy.errors import BackendError
from efficientface_deploy.predictor import load
from efficientface_deploy.vision.preprocess import UInt8Array
from efficientface_deploy.workbench.requirements import is_installed

POINTWISE = "pointwise convolutions"
DEPTHWISE = "depthwise convolutions"
GROUPED = "grouped convolutions"
DENSE = "dense convolutions"
MOVES = "Concat, Slice, Split, Reshape"
LAYOUT = "changes of memory layout"
CASTS = "Transpose and Cast"
QUANTISE = "Quantize and Dequantize"
REST = "the rest"
UNKNOWN = "convolutions of unknown shape"
KINDS = (POINTWISE, DEPTHWISE, GROUPED, DENSE, UNKNOWN, MOVES, LAYOUT, CASTS, QUANTISE, REST)

# Other providers run the whole graph as one node of ONNX Runtime's.
PROFILED = ("onnx:cpu", "onnx:cuda")

_WARM_UP = 20
_SUFFIX = "_kernel_time"  # of a node's name in ONNX Runtime's trace
_CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger")
_KIND_OF = {
    **dict.fromkeys(("Concat", "QLinearConcat", "Slice", "Split", "Reshape", "Squeeze"), MOVES),
    **dict.fromkeys(("Unsqueeze", "Flatten", "Gather"), MOVES),
    **dict.fromkeys(("ReorderInput", "ReorderOutput"), LAYOUT),
    **dict.fromkeys(("Transpose", "Cast"), CASTS),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), QUANTISE),
}

Event = Mapping[str, Any]


def profile_onnx(candidate: Candidate, images: Sequence[UInt8Array], runs: int) -> dict[str, Any]:
    """Profile a model that ONNX Runtime runs.

    Args:
        candidate: On one of :data:`PROFILED`.
        images: Batches, each uint8 (N, S, S, 3), taken in turn.
        runs: Passes that count, after a warm-up.

    Returns:
        A JSON object: ``kinds`` and ``layers``, each with the median microseconds of a pass.
    """
    predictor = candidate.predictor
    with (
        tempfile.TemporaryDirectory() as folder,
        profiled(Path(folder)),
        load(predictor.path, backend=candidate.backend, threads=candidate.threads) as own,
    ):
        for number in range(_WARM_UP + runs):
            own.infer(images[number % len(images)])
        # The public interface has no profile, and this session is nobody else's.
        backend: Any = own._backend
        trace = json.loads(Path(backend._session.end_profiling()).read_text("utf-8"))
    layers = summarise(trace, _WARM_UP, stored_weights(predictor.path))
    return {
        **candidate.key(),
        "batch": len(images[0]),
        "runs": runs,
        "total_us": sum(layer["us"] for layer in layers),
        "kinds": by_kind(layers),
        "layers": sorted(layers, key=lambda layer: -layer["us"]),
    }


def summarise(
    trace: Sequence[Event], skipped: int, stored: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """The median time of each node, in the order in which they first ran.

    Args:
        trace: Events of ONNX Runtime's profiler.
        skipped: First passes to leave out.
        stored: From :func:`stored_weights`.
    """
    durations: dict[str, list[float]] = {}
    first: dict[str, Event] = {}
    for event in trace:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            name = _layer_name(event["name"])
            durations.setdefault(name, []).append(event["dur"])
            first.setdefault(name, event["args"])
    layers = []
    for name, times in durations.items():
        node = first[name]
        weight = weight_shape(name, node, stored)
        layer = {"name": name, "operator": node["op_name"], "kind": kind_of(node, weight)}
        layer |= {"us": statistics.median(times[skipped:] or times)}
        layers.append({**layer, "multiply_adds": multiply_adds(node, weight)})
    return layers


def kind_of(node: Event, weight: Sequence[int] | None) -> str:
    """What a node of the trace does, among :data:`KINDS`.

    Args:
        node: The event's arguments.
        weight: A convolution's (out, in / groups, kH, kW); None of another node, or unknown.
    """
    operator = node["op_name"]
    if operator not in _CONVOLUTIONS:
        return _KIND_OF.get(operator, REST)
    if weight is None:
        return UNKNOWN
    picture = _shapes(node["input_type_shape"])[0]  # (N, C, H, W), or (N, H, W, C)
    # Only one of the two can be the channels: the last axis where it says so or C does not divide.
    channels = picture[1]
    if picture[1] % weight[1] or picture[2] == picture[1] != picture[3]:
        channels = picture[3]
    if channels > weight[1]:
        return DEPTHWISE if weight[1] == 1 else GROUPED
    return POINTWISE if list(weight[2:]) == [1, 1] else DENSE


def multiply_adds(node: Event, weight: Sequence[int] | None) -> int:
    """Multiply-adds of a convolution for the whole batch; 0 of any other node."""
    if weight is None:
        return 0
    output = _shapes(node["output_type_shape"])[0]  # (N, out, H, W), or (N, H, W, out)
    return math.prod(weight[1:]) * math.prod(output)


def weight_shape(
    name: str, node: Event, stored: Mapping[str, Sequence[int]]
) -> Sequence[int] | None:
    """A convolution's weight, (out, in / groups, kH, kW).

    The trace has it, but for weights that ONNX Runtime packed: those are looked up in the file by
    the node's name, which fusions make longer.
    """
    if node["op_name"] not in _CONVOLUTIONS:
        return None
    traced = [shape for shape in _shapes(node["input_type_shape"])[1:] if len(shape) == 4]
    if traced:
        return traced[0]
    names = [known for known in stored if name.startswith(known)]
    return stored[max(names, key=len)] if names else None


def stored_weights(path: Path) -> dict[str, list[int]]:
    """Shape of each convolution's weight in an ONNX file; empty without the package onnx."""
    if not is_installed("onnx"):
        return {}
    import onnx

    graph = onnx.load(path).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return {
        node.name: shapes[node.input[1]]
        for node in graph.node
        if node.op_type == "Conv" and node.input[1] in shapes
    }


def by_kind(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers' times, by what they do, in the order of :data:`KINDS`."""
    total = sum(layer["us"] for layer in layers) or 1.0
    rows = []
    for kind in KINDS:
        own = [layer for layer in layers if layer["kind"] == kind]
        if own:
            us, arithmetic = (sum(layer[key] for layer in own) for key in ("us", "multiply_adds"))
            row = {"kind": kind, "us": us, "share": us / total, "nodes": len(own)}
            rows.append({**row, "multiply_adds": arithmetic})
    return rows


def inspect_engine(candidate: Candidate) -> dict[str, Any]:
    """The layers of an engine, as TensorRT's inspector lists them.

    Raises:
        BackendError: The library does not load the plan again.
    """
    path = candidate.predictor.path
    module = load_library(candidate.backend)
    logger = make_logger(module)
    plan = module.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if plan is None:
        expected = f"{module.__name__} to load the plan again"
        found = logger.first_error() or "no reason given"
        raise BackendError(path.name, expected, found, "leave --profile out")
    inspector = plan.create_engine_inspector()
    text = inspector.get_engine_information(module.LayerInformationFormat.JSON)
    return {**candidate.key(), "engine_layers": engine_layers(text)}


def engine_layers(text: str) -> list[dict[str, str]]:
    """Name and kind of each layer; an engine built without details has names alone."""
    layers = json.loads(text).get("Layers", [])
    named = [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]
    return [
        {"name": layer.get("Name", ""), "kind": layer.get("LayerType", "unknown")}
        for layer in named
    ]


def _layer_name(name: str) -> str:
    """The node's own name, without what ONNX Runtime's passes put around it."""
    name = name.removesuffix(_SUFFIX).removesuffix("_nchwc")
    return name.removeprefix("InsertedPrecisionFreeCast_")


def _shapes(types: Sequence[Mapping[str, list[int]]]) -> list[list[int]]:
    """``[{"float": [1, 3]}]`` -> ``[[1, 3]]``."""
    return [shape for entry in types for shape in entry.values()]
