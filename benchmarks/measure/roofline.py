"""The floor: the time that a network's multiply-adds take at the measured peak.

The floor is arithmetic alone. A network of a few megabytes stays in the caches between two calls,
so that the time to read it from memory is no lower bound; it is recorded beside it (``memory_ms``)
for machines where it matters. What counts is the network's work, not a file's: the fewest
multiply-adds of all files of the same network in the run. Padding and identity weights in a graph
are part of the distance, not of the floor.

The peak of arithmetic is measured by a matrix product, for each number of threads and each number
format, with every library that is here, since none reaches the machine's peak everywhere: numpy's
BLAS may have been built or told to leave instructions out, and ONNX Runtime's kernels are those
that the models run on. The best of them counts. Each library gets a process of its own, in which
its threads can be set and no other library's threads spin. Bandwidth is a copy between arrays that
do not fit into the last-level cache, by as many threads.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import ROOT
from benchmarks.measure.models import Contender
from efficientface_deploy.workbench.environment import (
    last_level_cache_bytes,
    memory_bytes,
)

if TYPE_CHECKING:
    import torch

# What must be equal for two files to hold the same network.
Network = tuple[str, int, int]


def network_of(contender: Contender) -> Network:
    """Name, input size and classes: what tells networks apart in a run."""
    spec = contender.predictor.spec
    return f"{spec.architecture}, {spec.name}", spec.input_size, spec.num_classes


def count_multiply_adds(contenders: Sequence[Contender]) -> dict[str, int | None]:
    """Multiply-adds of one image, by model: as its graph is laid out, zero weights included.

    Returns:
        None for an engine, and for an ONNX file where the package onnx is not installed.
    """
    counts: dict[str, int | None] = {}
    for contender in contenders:
        if contender.model not in counts:
            counts[contender.model] = _count(contender)
    return counts


def fewest_multiply_adds(
    contenders: Sequence[Contender], counts: Mapping[str, int | None]
) -> dict[Network, int]:
    """The fewest multiply-adds of any file of each network."""
    fewest: dict[Network, int] = {}
    for contender in contenders:
        count = counts.get(contender.model)
        if count is not None:
            network = network_of(contender)
            fewest[network] = min(count, fewest.get(network, count))
    return fewest


def floor_of(
    contender: Contender,
    batch: int,
    p50_ms: float,
    fewest: Mapping[Network, int],
    ceilings: Mapping[str, Any],
) -> dict[str, float] | None:
    """How far a row is from the floor.

    Args:
        contender: Model, backend and threads.
        batch: Images in a call.
        p50_ms: The row's median, milliseconds.
        fewest: From :func:`fewest_multiply_adds`.
        ceilings: From :func:`ceilings.measure_ceilings`; may hold the GPU's.

    Returns:
        ``multiply_adds`` of an image, ``ms`` of the whole batch at the peak, ``distance`` (the
        median by it, above 1 unless the peak was measured too low), ``memory_ms`` (weights and
        pictures once from memory); None where the peak or the count is not known.
    """
    multiply_adds = fewest.get(network_of(contender))
    rate = _rate(contender, ceilings)
    if multiply_adds is None or rate is None:
        return None
    milliseconds = 1e3 * multiply_adds * batch / rate
    floor = {
        "multiply_adds": multiply_adds,
        "ms": milliseconds,
        "distance": p50_ms / milliseconds,
    }
    bandwidth = [
        row["bytes_per_second"]
        for row in ceilings["bandwidth"]
        if contender.threads is not None and row["threads"] <= contender.threads
    ]
    if bandwidth:
        side = contender.predictor.spec.input_size
        moved = contender.predictor.path.stat().st_size + batch * side * side * 3
        floor["memory_ms"] = 1e3 * moved / max(bandwidth)
    return floor


def _rate(contender: Contender, ceilings: Mapping[str, Any]) -> float | None:
    if contender.on_gpu:
        rates: Mapping[str, float] = ceilings.get("gpu") or {}
        return rates.get(contender.precision)
    return peak(ceilings, contender.threads, contender.precision)


def _count(contender: Contender) -> int | None:
    path = contender.predictor.path
    if contender.backend.startswith("torch"):
        return _count_torch(contender)
    if path.suffix == ".onnx":
        return count_onnx(path)
    return None


def count_onnx(path: Path) -> int | None:
    """Multiply-adds of an ONNX file; None without the package onnx, or for a foreign graph."""
    if importlib.util.find_spec("onnx") is None:
        return None
    import onnx

    from efficientface_export.graph.io import multiply_adds

    try:
        return multiply_adds(onnx.load(path))
    except (KeyError, onnx.shape_inference.InferenceError):
        return None  # weights that are computed, or shapes that nobody can know


def _count_torch(contender: Contender) -> int:
    """Multiply-adds of the module's convolutions and linear layers, seen in a pass."""
    import torch

    from efficientface_deploy.models import load_checkpoint

    network, spec = load_checkpoint(contender.predictor.path, contender.preset)
    total = 0

    def add(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        # (out, in / groups, kH, kW) by (1, out, H, W), or (out, in) by (1, out)
        total += weight.numel() * functools.reduce(int.__mul__, output.shape[2:], 1)

    hooks = [
        module.register_forward_hook(add)
        for module in network.modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, spec.input_size, spec.input_size))
    for hook in hooks:
        hook.remove()
    return total


LIBRARIES = ("numpy", "torch", "onnxruntime")


# A format's numbers can be held and multiplied in each that comes before it.
FORMATS = ("fp32", "fp16", "int8")


_SIZES = (
    384,
    768,
    1536,
)  # of the matrices; small ones fit the caches, large ones hide the overhead


_SECONDS = 0.15  # for each size


_SLOW = 0.2  # seconds of one product; a library without kernels for a format is not asked for more


_TIMEOUT = 120


_COPIES = 5


_LARGEST_COPY = 1 << 30


# Where a library reads how many threads it may start.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


Product = Callable[[], object]


def measure_ceilings(threads: Sequence[int]) -> dict[str, Any]:
    """Peak arithmetic and bandwidth for each number of threads.

    Args:
        threads: CPU threads.

    Returns:
        A JSON object: ``arithmetic`` has a row for each number of threads and format,
        ``bandwidth`` one for each number of threads.
    """
    return {
        "arithmetic": [
            row for count in threads for row in arithmetic_rows(count, ask_libraries(count))
        ],
        "bandwidth": [copy_bandwidth(count) for count in threads],
    }


def arithmetic_rows(threads: int, found: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The best of the libraries for each format.

    Args:
        threads: CPU threads that they had.
        found: Library -> format -> multiply-adds a second.
    """
    rows = []
    for number_format in FORMATS:
        tried = {
            library: rates[number_format]
            for library, rates in found.items()
            if number_format in rates
        }
        if tried:
            best = max(tried, key=lambda library: tried[library])
            rows.append(
                {
                    "threads": threads,
                    "format": number_format,
                    "multiply_adds_per_second": tried[best],
                    "by": best,
                    "tried": tried,
                }
            )
    return rows


def peak(ceilings: Mapping[str, Any], threads: int | None, precision: str) -> float | None:
    """Multiply-adds a second that nothing of this precision can exceed, as far as was measured.

    A CPU that has nothing for FP16 or INT8 computes them in a wider format, and more threads can do
    what fewer can: the best of all formats that hold the numbers, and of all fewer threads, counts.

    Args:
        ceilings: From :func:`measure_ceilings`.
        threads: CPU threads; None (a GPU) has no ceiling here.
        precision: ``fp32``, ``fp16`` or ``int8``; anything else is taken for FP32.
    """
    if threads is None:
        return None
    known = FORMATS.index(precision) if precision in FORMATS else 0
    rates = [
        row["multiply_adds_per_second"]
        for row in ceilings["arithmetic"]
        if row["threads"] <= threads and FORMATS.index(row["format"]) <= known
    ]
    return max(rates, default=None)


def ask_libraries(threads: int) -> dict[str, dict[str, float]]:
    """Each library's multiply-adds a second for each format; without those that are not here."""
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
    found = {}
    for library in LIBRARIES:
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, library, str(threads)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env=environment,
                timeout=_TIMEOUT,
                check=True,
            )
            found[library] = json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            continue  # not installed, or broken: the others say what the machine can do
    return found


def copy_bandwidth(threads: int) -> dict[str, Any]:
    """Bytes read and written a second by a copy that does not fit into the last-level cache.

    Args:
        threads: How many copy, each its share; numpy releases the interpreter's lock for it.
    """
    size = _copy_bytes()
    source = np.ones(size // 8)  # float64
    target = np.zeros_like(source)
    shares = list(
        zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
    )
    best = min(_time_copy(shares) for _ in range(_COPIES))
    return {
        "threads": threads,
        "bytes_per_second": 2 * source.nbytes / best,  # each byte is read once and written once
        "array_bytes": source.nbytes,
        "larger_than_cache": 2 * source.nbytes > last_level_cache_bytes(),
    }


def _copy_bytes() -> int:
    """An array as large as the last-level cache: source and target are then twice its size."""
    wanted = max(last_level_cache_bytes(), 64 << 20)
    affordable = (memory_bytes() or 8 * wanted) // 8
    return min(wanted, affordable, _LARGEST_COPY)


def _time_copy(shares: Sequence[tuple[Any, Any]]) -> float:
    workers = [threading.Thread(target=np.copyto, args=share) for share in shares[1:]]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    np.copyto(*shares[0])
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def measure_library(library: str, threads: int) -> dict[str, float]:
    """Multiply-adds a second of one library for each format that it knows; its threads are set."""
    makers = {"numpy": _numpy_product, "torch": _torch_product, "onnxruntime": _onnx_product}
    rates: dict[str, float] = {}
    for number_format in FORMATS:
        for size in _SIZES:
            product = makers[library](number_format, size, threads)
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


def _numpy_product(number_format: str, size: int, threads: int) -> Product | None:
    if number_format != "fp32":
        return None  # numpy multiplies the others without BLAS
    left, right = np.random.default_rng(0).random((2, size, size), dtype=np.float32)
    out = np.empty_like(left)
    return lambda: np.matmul(left, right, out=out)


def _torch_product(number_format: str, size: int, threads: int) -> Product | None:
    import torch

    torch.set_num_threads(threads)
    if number_format == "int8":
        return None  # its matrix product of integers is not the one of its quantised layers
    kind = {"fp32": torch.float32, "fp16": torch.float16}[number_format]
    left, right = torch.rand(2, size, size).to(kind)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _onnx_product(number_format: str, size: int, threads: int) -> Product | None:
    """ONNX Runtime's own kernels; the weights are a constant, packed once, as a network's are."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    operator, left_type, weight_type, out_type = {
        "fp32": ("MatMul", np.float32, np.float32, TensorProto.FLOAT),
        "fp16": ("MatMul", np.float16, np.float16, TensorProto.FLOAT16),
        "int8": ("MatMulInteger", np.uint8, np.int8, TensorProto.INT32),
    }[number_format]
    generator = np.random.default_rng(0)
    left, weight = (
        (100 * generator.random((size, size))).astype(kind) for kind in (left_type, weight_type)
    )
    # fp16 would overflow with numbers up to 100: its sums stay far below 65504.
    if number_format == "fp16":
        left, weight = left / np.float16(100), weight / np.float16(100)
    tensor = numpy_helper.from_array(weight, "right")
    left_kind = helper.np_dtype_to_tensor_dtype(left.dtype)
    graph = helper.make_graph(
        [helper.make_node(operator, ["left", "right"], ["out"])],
        "product",
        [helper.make_tensor_value_info("left", left_kind, [size, size])],
        [helper.make_tensor_value_info("out", out_type, [size, size])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"left": left})


if __name__ == "__main__":
    print(json.dumps(measure_library(sys.argv[1], int(sys.argv[2]))))
