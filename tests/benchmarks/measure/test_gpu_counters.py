"""A GPU's energy, on a fake: there is no GPU here."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.measure import gpu_counters as module
from benchmarks.measure.gpu_counters import energy_per_call, open_energy_meter


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


def test_energy_is_the_counters_difference_by_calls() -> None:
    reading = itertools.count(1000, 50)
    calls: list[int] = []
    times = itertools.count()
    joules = energy_per_call(
        lambda: next(reading), lambda: calls.append(1), seconds=5, clock=lambda: next(times)
    )
    # The clock says 0, then 1 to 5 after each call but the first, which is never asked.
    assert len(calls) == 5 and joules == pytest.approx(50 / 5)


@pytest.mark.parametrize(("fails", "there"), [(False, True), (True, False)])
def test_the_meter_is_there_or_not(
    fails: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_installed", lambda name: True)
    monkeypatch.setattr(module.importlib, "import_module", lambda name: FakeNvml(fails))
    joules = open_energy_meter()
    assert (joules is not None) == there
    if joules is not None:
        assert joules() - joules() == -50
    monkeypatch.setattr(module, "is_installed", lambda name: False)
    assert open_energy_meter() is None
