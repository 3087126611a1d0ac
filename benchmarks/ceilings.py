"""What this machine can do at best: multiply-adds a second, and bytes a second.

Arithmetic is measured by a matrix product, for each number of threads and each number format, with
every library that is here, since none reaches the machine's peak everywhere: numpy's BLAS may have
been built or told to leave instructions out, and ONNX Runtime's kernels are those that the models
run on. The best of them counts. Each library gets a process of its own, in which its threads can be
set and no other library's threads spin. Bandwidth is a copy between arrays that do not fit into the
last-level cache, by as many threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import last_level_cache_bytes, memory_bytes

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
                [sys.executable, __file__, library, str(threads)],
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
