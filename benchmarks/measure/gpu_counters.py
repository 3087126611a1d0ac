"""The energy that a GPU takes, by NVML (``pip install nvidia-ml-py``).

Clocks and limits are read, never set.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from efficientface_deploy.workbench.requirements import is_installed

_ENERGY_SECONDS = 2.0  # NVML's counter moves every 20 to 100 ms


class EnergyMeter:
    """The energy that a GPU took since its driver was loaded.

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
    if not is_installed("pynvml"):
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
