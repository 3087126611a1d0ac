"""The energy that a GPU takes, by NVML (``pip install nvidia-ml-py``).

Clocks and limits are read, never set.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from efficientface_deploy.workbench.requirements import is_installed

Joules = Callable[[], float]  # since the driver was loaded; two readings tell what lies between

_ENERGY_SECONDS = 2.0  # NVML's counter moves every 20 to 100 ms


def open_energy_meter() -> Joules | None:
    """The first GPU's counter; None without NVML, a GPU, or a counter (before Volta)."""
    if not is_installed("pynvml"):
        return None
    nvml = importlib.import_module("pynvml")

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(device)) / 1e3

    try:
        nvml.nvmlInit()
        device = nvml.nvmlDeviceGetHandleByIndex(0)
        joules()
    except nvml.NVMLError:
        return None
    return joules


def energy_per_call(
    joules: Joules,
    call: Callable[[], None],
    *,
    seconds: float = _ENERGY_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Joules of a call, one after another, what the GPU takes when idle included."""
    count, before, end = 0, joules(), clock() + seconds
    while count == 0 or clock() < end:
        call()
        count += 1
    return (joules() - before) / count
