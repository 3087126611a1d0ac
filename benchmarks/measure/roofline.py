"""The roofline: the time that a network's multiply-adds take at the machine's measured peak.

It is arithmetic alone: a network of a few megabytes stays in the caches between two calls, so that
the time to read it from memory is no lower bound. What counts is the network's work, not a file's:
the fewest multiply-adds of all files of the same network in the run. Padding and identity weights
in a graph are part of the distance, not of the roofline.

The peak is that of a matrix product, for each number of threads and each number format, with every
library that is here, since none reaches the machine's peak everywhere: numpy's BLAS may have been
built or told to leave instructions out, and ONNX Runtime's kernels are those that the models run
on. The best of them counts. Each library gets a process of its own, in which its threads can be set
and no other library's threads spin.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measure.processes import ProcessError, run_job
from efficientface_deploy.workbench.requirements import is_installed

if TYPE_CHECKING:  # a process that measures one library imports no other
    from benchmarks.measure.models import Candidate

LIBRARIES = ("numpy", "torch", "onnxruntime")
# A format's numbers can be held and multiplied in each that comes before it.
FORMATS = ("fp32", "fp16", "int8")

# Sides of the matrices: small ones fit the caches, large ones hide the overhead.
_SIZES = {"cpu": (384, 768, 1536), "cuda": (4096,)}
_SECONDS = 0.15  # for each size
_SLOW = 0.2  # seconds of one product; a library without kernels for a format is not asked for more
# Where a library reads how many threads it may start.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Product = Callable[[], object]
Network = tuple[str, int, int]  # what must be equal for two files to hold the same network


# ---- multiply-adds


def count_multiply_adds(candidates: Sequence[Candidate]) -> dict[str, int | None]:
    """Multiply-adds of one image, by model: as its graph is laid out, zero weights included.

    Returns:
        None for an engine, for an ONNX file where the package onnx is not installed, and for a
        graph whose shapes nobody can know.
    """
    counts: dict[str, int | None] = {}
    for candidate in {entry.model: entry for entry in candidates}.values():
        path, counts[candidate.model] = candidate.predictor.path, None
        if candidate.backend.startswith("torch"):
            counts[candidate.model] = count_torch(path, candidate.preset)
        elif path.suffix == ".onnx" and is_installed("onnx"):
            counts[candidate.model] = count_onnx(path)
    return counts


def count_onnx(path: Path) -> int | None:
    """Multiply-adds of an ONNX file; None for a foreign graph that does not tell."""
    import onnx

    from efficientface_export.graph.io import multiply_adds

    try:
        return multiply_adds(onnx.load(path))
    except (KeyError, onnx.shape_inference.InferenceError):
        return None  # weights that are computed, or shapes that nobody can know


def count_torch(path: Path, preset: str | None) -> int:
    """Multiply-adds of a checkpoint's convolutions and linear layers."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from efficientface_deploy.models import load_checkpoint

    network, spec = load_checkpoint(path, preset)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, spec.input_size, spec.input_size))
    return int(counter.get_total_flops()) // 2  # a multiplication and an addition


def network_of(candidate: Candidate) -> Network:
    """Name, input size and classes: what tells networks apart in a run."""
    spec = candidate.predictor.spec
    return f"{spec.architecture}, {spec.name}", spec.input_size, spec.num_classes


def fewest_multiply_adds(
    candidates: Sequence[Candidate], counts: Mapping[str, int | None]
) -> dict[Network, int]:
    """The fewest multiply-adds of any file of each network."""
    fewest: dict[Network, int] = {}
    for candidate in candidates:
        count = counts.get(candidate.model)
        if count is not None:
            network = network_of(candidate)
            fewest[network] = min(count, fewest.get(network, count))
    return fewest


# ---- a row's distance


def roofline_of(
    candidate: Candidate,
    batch: int,
    p50_ms: float,
    fewest: Mapping[Network, int],
    peaks: Mapping[str, Any],
) -> dict[str, float] | None:
    """How far a row is from the roofline.

    Args:
        candidate: Model, backend and threads.
        batch: Images in a call.
        p50_ms: The row's median, milliseconds.
        fewest: From :func:`fewest_multiply_adds`.
        peaks: From :func:`measure_peaks`.

    Returns:
        ``multiply_adds`` of an image, ``ms`` of the whole batch at the peak, ``distance`` (the
        median by it, above 1 unless the peak was measured too low); None where the peak or the
        count is not known.
    """
    multiply_adds = fewest.get(network_of(candidate))
    if candidate.on_gpu:
        rate = peaks.get("gpu", {}).get(candidate.precision)
    else:
        rate = peak_rate(peaks, candidate.threads, candidate.precision)
    if multiply_adds is None or rate is None:
        return None
    milliseconds = 1e3 * multiply_adds * batch / rate
    return {"multiply_adds": multiply_adds, "ms": milliseconds, "distance": p50_ms / milliseconds}


def peak_rate(peaks: Mapping[str, Any], threads: int | None, precision: str) -> float | None:
    """Multiply-adds a second: the best of as many threads or fewer, in this format or a wider one.

    Args:
        peaks: From :func:`measure_peaks`.
        threads: CPU threads; None (a GPU) has no peak here.
        precision: ``fp32``, ``fp16`` or ``int8``; anything else is taken for FP32.
    """
    if threads is None:
        return None
    known = FORMATS.index(precision) if precision in FORMATS else 0
    rates = [
        row["multiply_adds_per_second"]
        for row in peaks["arithmetic"]
        if row["threads"] <= threads and FORMATS.index(row["format"]) <= known
    ]
    return max(rates, default=None)


# ---- the machine's peak


def measure_peaks(threads: Sequence[int], *, gpu: bool = False) -> dict[str, Any]:
    """Peak arithmetic for each number of threads, and of the GPU where it is asked for.

    Returns:
        A JSON object: ``arithmetic`` has a row for each number of threads and format, ``gpu``
        multiply-adds a second by format, empty without PyTorch for CUDA.
    """
    peaks: dict[str, Any] = {
        "arithmetic": [row for count in threads for row in measure_arithmetic(count)]
    }
    if gpu:
        peaks["gpu"] = {}
        with contextlib.suppress(ProcessError):
            peaks["gpu"] = run_job(measure_library, "torch", 1, "cuda")
    return peaks


def measure_arithmetic(threads: int) -> list[dict[str, Any]]:
    """Peak arithmetic: a row for each format, with the best of the libraries that are here."""
    environment = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    found: dict[str, dict[str, float]] = {}
    for library in LIBRARIES:
        with contextlib.suppress(ProcessError):  # the others say what the machine can do
            found[library] = run_job(measure_library, library, threads, environment=environment)
    rows = []
    for name in FORMATS:
        tried = {library: rates[name] for library, rates in found.items() if name in rates}
        if tried:
            best = max(tried, key=lambda library: tried[library])
            row = {"threads": threads, "format": name, "multiply_adds_per_second": tried[best]}
            rows.append({**row, "by": best, "tried": tried})
    return rows


def measure_library(library: str, threads: int, device: str = "cpu") -> dict[str, float]:
    """Multiply-adds a second of one library for each format that it knows; its threads are set."""
    makers = {"numpy": _numpy_product, "torch": _torch_product, "onnxruntime": _onnx_product}
    rates: dict[str, float] = {}
    for number_format in FORMATS:
        for size in _SIZES[device]:
            product = makers[library](number_format, size, threads, device)
            if product is None:
                break
            seconds = _shortest(product)
            rates[number_format] = max(size**3 / seconds, rates.get(number_format, 0.0))
            if seconds > _SLOW:
                break
    return rates


def _shortest(product: Product) -> float:
    """The shortest of the calls that fit into the time: what else the machine did is not in it."""
    product()
    durations: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not durations or time.perf_counter() < end:
        start = time.perf_counter()
        product()
        durations.append(time.perf_counter() - start)
    return min(durations)


def _numpy_product(number_format: str, size: int, threads: int, device: str) -> Product | None:
    if number_format != "fp32":
        return None  # numpy multiplies the others without BLAS
    left, right, out = np.random.default_rng(0).random((3, size, size), dtype=np.float32)
    return lambda: np.matmul(left, right, out=out)


def _torch_product(number_format: str, size: int, threads: int, device: str) -> Product | None:
    import torch

    torch.set_num_threads(threads)
    if number_format == "int8":
        if device == "cpu":
            return None  # its matrix product of integers is not the one of its quantised layers
        left, right = torch.ones(2, size, size, dtype=torch.int8, device=device)
        multiply = functools.partial(torch._int_mm, left, right)
    else:
        kind = {"fp32": torch.float32, "fp16": torch.float16}[number_format]
        left, right = torch.rand(2, size, size, device=device).to(kind)
        multiply = functools.partial(torch.mm, left, right, out=torch.empty_like(left))

    def product() -> None:
        multiply()
        if device == "cuda":
            torch.cuda.synchronize()

    return product


def _onnx_product(number_format: str, size: int, threads: int, device: str) -> Product | None:
    """ONNX Runtime's own kernels; the weights are a constant, packed once, as a network's are."""
    from onnx import TensorProto, helper, numpy_helper

    from benchmarks.measure.sessions import open_session

    operator, left_type, weight_type, out_type = {
        "fp32": ("MatMul", np.float32, np.float32, TensorProto.FLOAT),
        "fp16": ("MatMul", np.float16, np.float16, TensorProto.FLOAT16),
        "int8": ("MatMulInteger", np.uint8, np.int8, TensorProto.INT32),
    }[number_format]
    # FP16 would overflow with numbers up to 100: its sums stay far below 65504.
    largest = 1 if number_format == "fp16" else 100
    values = largest * np.random.default_rng(0).random((2, size, size))
    left, weight = values[0].astype(left_type), values[1].astype(weight_type)
    left_kind = helper.np_dtype_to_tensor_dtype(left.dtype)
    graph = helper.make_graph(
        [helper.make_node(operator, ["left", "right"], ["out"])],
        "product",
        [helper.make_tensor_value_info("left", left_kind, [size, size])],
        [helper.make_tensor_value_info("out", out_type, [size, size])],
        [numpy_helper.from_array(weight, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = open_session(model.SerializeToString(), threads)
    return lambda: session.run(None, {"left": left})
