"""A GPU's figures, on fakes: there is no GPU here."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import gpu_counters as module
from benchmarks.measure.gpu_counters import (
    EnergyMeter,
    energy_per_call,
    measure_gpu,
    open_energy_meter,
    peak_by_torch,
    stage_times,
)
from benchmarks.measure.models import Contender

IMAGES = [np.full((2, 4, 4, 3), value, np.uint8) for value in (1, 2, 3)]


class FakeNvml:
    """A counter that moves by 50 J at each reading."""

    class NVMLError(Exception):
        pass

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.reading = itertools.count(1000, 50)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        if self.fails:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"gpu{index}"

    def nvmlDeviceGetTotalEnergyConsumption(self, device: str) -> int:  # noqa: N802
        assert device == "gpu0"
        return 1000 * next(self.reading)  # millijoules


class FakeBackend:
    """Times its stages; each call takes longer than the one before."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def stages(self, images: np.ndarray) -> dict[str, float]:
        self.seen.append(int(images[0, 0, 0, 0]))
        number = float(len(self.seen))
        return {"host_to_device": number, "compute": 10 * number, "device_to_host": 0.5}


def contender(backend: str, inner: object) -> Contender:
    predictor: Any = SimpleNamespace(backend=backend, _backend=inner, provenance={})
    return Contender("a.engine", predictor, None)


def test_stages_are_medians_over_inputs_in_turn() -> None:
    backend = FakeBackend()
    found = stage_times(backend, IMAGES, 5)
    assert found == {"host_to_device_ms": 3, "compute_ms": 30, "device_to_host_ms": 0.5}
    assert backend.seen == [1, 2, 3, 1, 2]
    assert stage_times(object(), IMAGES, 5) is None


def test_energy_is_the_counters_difference_by_calls() -> None:
    meter = EnergyMeter(FakeNvml())
    calls: list[int] = []
    times = itertools.count()
    joules = energy_per_call(meter, lambda: calls.append(1), seconds=5, clock=lambda: next(times))
    # The clock says 0, then 1 to 5 after each call but the first, which is never asked.
    assert len(calls) == 5 and joules == pytest.approx(50 / 5)


def test_a_gpus_row_gets_what_there_is_and_a_cpus_nothing() -> None:
    meter = EnergyMeter(FakeNvml())
    done: list[int] = []
    on_cpu = contender("onnx:cpu", FakeBackend())
    assert measure_gpu(on_cpu, IMAGES, lambda: done.append(1), meter, 3) == {}
    assert done == []
    module_seconds = module._ENERGY_SECONDS
    assert module_seconds > 0.5  # NVML's counter moves ten to fifty times a second
    assert measure_gpu(contender("trt", object()), IMAGES, lambda: None, None, 3) == {}
    found = measure_gpu(contender("onnx:cuda", FakeBackend()), IMAGES, lambda: None, None, 3)
    assert found["stages"]["compute_ms"] == 20 and "joules_per_image" not in found


def test_energy_is_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "energy_per_call", lambda meter, call: 3.0)
    meter = EnergyMeter(FakeNvml())
    found = measure_gpu(contender("trt", object()), IMAGES, lambda: None, meter, 3)
    assert found == {"joules_per_image": 1.5}  # two images in a batch


@pytest.mark.parametrize(("fails", "there"), [(False, True), (True, False)])
def test_the_meter_is_there_or_not(
    fails: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module.importlib, "import_module", lambda name: FakeNvml(fails))
    assert (open_energy_meter() is not None) == there
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert open_energy_meter() is None


def test_the_peak_is_the_shortest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    assert peak_by_torch(32) == {}  # no CUDA here
    rates = peak_by_torch(32, "cpu")
    assert {"fp32", "fp16"} <= set(rates) and all(rate > 0 for rate in rates.values())
    monkeypatch.setattr(module, "_product_seconds", lambda *arguments: 0.5)
    assert peak_by_torch(32, "cpu")["fp32"] == pytest.approx(32**3 / 0.5)
