"""Ranges of a network's tensors on real images: for FP16's limit, and for INT8's scales.

ONNX Runtime's own calibrators are not used: ``quantize_static`` passes them no number of bins, so
that Entropy has 128 and equals MinMax; and they keep every activation of every image in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from efficientface_deploy.errors import ExportError
from efficientface_deploy.workbench.requirements import require_package

BINS = 2048
PERCENTILE = 99.999  # at 99.99 what is clipped costs more than the finer steps gain
LEVELS = 128  # that INT8 has for magnitudes

_BATCH = 16
_ENTROPY_STEP = 8  # bins between two candidates: 0.4 % of the range

Array = npt.NDArray[Any]


def tensor_ranges(graph: onnx.ModelProto, images: Array) -> dict[str, float]:
    """Largest magnitude of every floating-point tensor of an FP32 graph, weights included.

    Args:
        graph: FP32.
        images: A batch as the graph takes it: uint8 (N, S, S, 3), or float32 (N, 3, S, S).

    Returns:
        Tensor name to max |x|; infinity where a value is not finite.
    """
    inferred = onnx.shape_inference.infer_shapes(graph)
    names = [
        value.name
        for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    ranges = {
        weight.name: _magnitude(onnx.numpy_helper.to_array(weight))
        for weight in graph.graph.initializer
        if weight.data_type == TensorProto.FLOAT
    }
    for values in run_tensors(graph, names, images):
        for name, value in values.items():
            ranges[name] = max(ranges.get(name, 0.0), _magnitude(value))
    return ranges


def activation_amax(
    graph: onnx.ModelProto, largest: Mapping[str, float], images: Array, method: str
) -> dict[str, float]:
    """Magnitude that the largest INT8 value is to stand for; what exceeds it is clipped.

    Args:
        graph: FP32.
        largest: Its activations that are to be quantised, each with its largest magnitude on
            these images, as :func:`tensor_ranges` gives it.
        images: Calibration batch as the graph takes it.
        method: ``minmax``: the largest magnitude; ``percentile``: the one that 99.999 % of the
            values stay below; ``entropy``: the one whose 128 levels lose least information, as in
            TensorRT's calibrator.

    Returns:
        Tensor name to amax.

    Raises:
        ExportError: A tensor is not finite.
    """
    if infinite := [name for name, magnitude in largest.items() if not np.isfinite(magnitude)]:
        found = f"NaN or infinity in {infinite[0]}"
        fix = "train the network anew: it overflows on the calibration images"
        raise ExportError("INT8", "finite values in every tensor", found, fix)
    if method == "minmax":
        return dict(largest)
    choose = {"percentile": _percentile_bins, "entropy": _entropy_bins}[method]
    histograms = _histograms(graph, largest, images)
    return {name: choose(histograms[name]) * largest[name] / BINS for name in largest}


def _histograms(
    graph: onnx.ModelProto, largest: Mapping[str, float], images: Array
) -> dict[str, npt.NDArray[np.int64]]:
    """Counts of |x| in equal bins from 0 to each tensor's largest magnitude."""
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in largest}
    for values in run_tensors(graph, list(largest), images):
        for name, value in values.items():
            scale = BINS / largest[name] if largest[name] > 0 else 0.0
            bins = np.minimum((np.abs(value) * scale).astype(np.int32), BINS - 1)
            counts[name] += np.bincount(bins.ravel(), minlength=BINS)
    return counts


def _percentile_bins(histogram: npt.NDArray[np.int64]) -> int:
    """Number of bins, from 0 on, that hold the percentile."""
    below = np.cumsum(histogram)
    return int(np.searchsorted(below, below[-1] * PERCENTILE / 100)) + 1


def _entropy_bins(histogram: npt.NDArray[np.int64]) -> int:
    """Number of bins whose quantisation to 128 levels diverges least from the whole."""
    counts = histogram.astype(np.float64)
    counts[0] = counts[1]  # zeros, half of what a ReLU gives, are exact at any scale
    candidates = range(LEVELS, BINS + 1, _ENTROPY_STEP)
    divergences = [_divergence(counts, kept) for kept in candidates]
    return candidates[int(np.argmin(divergences))]


def _divergence(counts: npt.NDArray[np.float64], kept: int) -> float:
    """KL(clipped || quantised) of the first ``kept`` bins; the rest is clipped to the last one."""
    clipped = counts[:kept].copy()
    clipped[-1] += counts[kept:].sum()
    occupied = counts[:kept] > 0
    starts = np.arange(LEVELS) * kept // LEVELS
    totals = np.add.reduceat(counts[:kept], starts)
    shares = np.maximum(np.add.reduceat(occupied.astype(np.float64), starts), 1)
    level = np.repeat(np.arange(LEVELS), np.diff(np.append(starts, kept)))
    quantised = (totals / shares)[level] * occupied
    if not clipped.any() or not quantised.any():
        return np.inf
    p, q = clipped / clipped.sum(), quantised / quantised.sum()
    with np.errstate(divide="ignore"):
        logarithms = np.log(p[p > 0] / q[p > 0])
    return float((p[p > 0] * logarithms).sum())


def run_tensors(
    graph: onnx.ModelProto, names: Sequence[str], images: Array, *, optimise: bool = True
) -> Iterator[dict[str, Array]]:
    """Run a graph on a CPU.

    Args:
        graph: FP32, or FP32 with Q/DQ pairs.
        names: Floating-point tensors of it.
        images: As the graph takes them.
        optimise: Whether ONNX Runtime may put other operators in the graph's place.

    Yields:
        The named tensors of one batch after the other.

    Raises:
        BackendError: onnxruntime is not installed.
    """
    require_package("onnxruntime")
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    fed = probe.graph.input[0].name
    own = {value.name for value in [*probe.graph.input, *probe.graph.output]}
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in names
        if name not in own
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    computed = [name for name in names if name != fed]
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        values = dict(zip(computed, session.run(computed, {fed: batch}), strict=True))
        yield {name: values.get(name, batch) for name in names}


def _magnitude(values: Array) -> float:
    largest = float(np.abs(values).max(initial=0.0))
    return largest if np.isfinite(largest) else np.inf
