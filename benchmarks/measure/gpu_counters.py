"""What only a GPU's rows have: stages by CUDA events, energy, and the peak of its arithmetic.

Each is asked for and left out where it is not there: a backend that can time its stages has a
method ``stages``, energy needs NVML (``pip install nvidia-ml-py``), the peak needs PyTorch for
CUDA. Clocks and limits are read, never set.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.measure.models import Contender
from efficientface_deploy.vision.preprocess import UInt8Array

STAGES = ("host_to_device", "compute", "device_to_host")

_ENERGY_SECONDS = 2.0  # NVML's counter moves every 20 to 100 ms
_PRODUCTS = 20


def stage_times(
    backend: object, images: Sequence[UInt8Array], calls: int
) -> dict[str, float] | None:
    """Medians of the stages of a call, milliseconds, as the backend's own CUDA events time them.

    Args:
        backend: If it can, it has ``stages(images)``, which runs a batch and gives the milliseconds
            of each of :data:`STAGES`.
        images: Batches, each uint8 (N, S, S, 3), taken in turn.
        calls: How many count.

    Returns:
        None where the backend has no such method.
    """
    stages = getattr(backend, "stages", None)
    if stages is None:
        return None
    timed = [stages(images[number % len(images)]) for number in range(calls)]
    return {f"{name}_ms": float(np.median([one[name] for one in timed])) for name in STAGES}


class EnergyMeter:
    """The energy that a GPU took since its driver was loaded, by NVML.

    Args:
        nvml: The module ``pynvml``, initialised.
        index: The GPU's number.
    """

    def __init__(self, nvml: Any, index: int = 0) -> None:
        self._nvml = nvml
        self._device = nvml.nvmlDeviceGetHandleByIndex(index)

    def joules(self) -> float:
        """The counter; two readings tell what lies between them."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3


def open_energy_meter() -> EnergyMeter | None:
    """NVML's counter of the first GPU; None without NVML, a GPU, or a counter (before Volta)."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        meter = EnergyMeter(nvml)
        meter.joules()
    except nvml.NVMLError:
        return None
    return meter


def energy_per_call(
    meter: EnergyMeter,
    call: Callable[[], None],
    *,
    seconds: float = _ENERGY_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Joules of a call, one after another, what the GPU takes when idle included."""
    count, before, end = 0, meter.joules(), clock() + seconds
    while count == 0 or clock() < end:
        call()
        count += 1
    return (meter.joules() - before) / count


def measure_gpu(
    contender: Contender,
    images: Sequence[UInt8Array],
    call: Callable[[], None],
    meter: EnergyMeter | None,
    calls: int,
) -> dict[str, Any]:
    """The part of a row that only a GPU has; empty for a CPU's contender.

    Args:
        contender: Open on a backend.
        images: Its batches.
        call: Runs the next of them.
        meter: From :func:`open_energy_meter`.
        calls: How many are timed by stages.
    """
    if not contender.on_gpu:
        return {}
    found: dict[str, Any] = {}
    # Timing by events is a backend's own affair: the public interface has no stages.
    stages = stage_times(contender.predictor._backend, images, calls)
    if stages:
        found["stages"] = stages
    if meter is not None:
        found["joules_per_image"] = energy_per_call(meter, call) / len(images[0])
    return found


def peak_by_torch(size: int = 4096, device: str = "cuda") -> dict[str, float]:
    """Multiply-adds a second of a matrix product, by format; empty without PyTorch for CUDA.

    Args:
        size: Of the matrices.
        device: Tests give ``cpu``.
    """
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {}
    rates = {}
    for name, kind in {"fp32": torch.float32, "fp16": torch.float16}.items():
        left, right = torch.rand(2, size, size, device=device).to(kind)
        rates[name] = size**3 / _product_seconds(left, right)
    if hasattr(torch, "_int_mm"):
        left, right = torch.ones(2, size, size, dtype=torch.int8, device=device)
        rates["int8"] = size**3 / _product_seconds(left, right, torch._int_mm)
    return rates


def _product_seconds(left: Any, right: Any, product: Any = None) -> float:
    """The shortest of several products, the host waiting for each."""
    import torch

    product = product or torch.mm

    synchronize = torch.cuda.synchronize if left.is_cuda else _nothing
    shortest = float("inf")
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        product(left, right)
        synchronize()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _nothing() -> None:
    pass
