"""The machine's peak: which of the libraries and formats counts."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.measure import roofline as module
from benchmarks.measure.roofline import arithmetic_rows, copy_bandwidth, measure_library, peak

CEILINGS: dict[str, Any] = {
    "arithmetic": [
        {"threads": 1, "format": "fp32", "multiply_adds_per_second": 80.0},
        {"threads": 1, "format": "fp16", "multiply_adds_per_second": 60.0},
        {"threads": 1, "format": "int8", "multiply_adds_per_second": 300.0},
        {"threads": 2, "format": "fp32", "multiply_adds_per_second": 150.0},
        {"threads": 2, "format": "int8", "multiply_adds_per_second": 250.0},
    ]
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIZES", (16, 32))
    monkeypatch.setattr(module, "_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("threads", "precision", "expected"),
    [
        (1, "fp32", 80.0),
        (1, "fp16", 80.0),  # in FP32, where that is faster
        (1, "int8", 300.0),
        (2, "fp32", 150.0),
        (2, "int8", 300.0),  # one thread was faster, and two can do what one can
        (1, "", 80.0),
        (None, "fp32", None),  # a GPU
    ],
)
def test_the_best_that_can_hold_the_numbers_counts(
    threads: int | None, precision: str, expected: float | None
) -> None:
    assert peak(CEILINGS, threads, precision) == expected


def test_fewer_threads_than_were_measured_have_no_peak() -> None:
    only_two = {"arithmetic": CEILINGS["arithmetic"][3:]}
    assert peak(only_two, 1, "fp32") is None


def test_a_row_names_the_library_that_gave_the_peak() -> None:
    rows = arithmetic_rows(2, {"numpy": {"fp32": 5.0}, "torch": {"fp32": 7.0, "fp16": 3.0}})
    assert [(row["format"], row["by"], row["multiply_adds_per_second"]) for row in rows] == [
        ("fp32", "torch", 7.0),
        ("fp16", "torch", 3.0),
    ]
    assert rows[0]["tried"] == {"numpy": 5.0, "torch": 7.0}
    assert rows[0]["threads"] == 2


@pytest.mark.parametrize(
    ("library", "formats"),
    [("numpy", {"fp32"}), ("torch", {"fp32", "fp16"}), ("onnxruntime", {"fp32", "fp16", "int8"})],
)
@pytest.mark.usefixtures("quick")
def test_each_library_multiplies_in_its_formats(library: str, formats: set[str]) -> None:
    pytest.importorskip(library)
    rates = measure_library(library, 1)
    assert set(rates) == formats
    assert all(rate > 1e5 for rate in rates.values())


def test_rate_is_the_products_multiply_adds_by_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SIZES", (100, 200))
    monkeypatch.setattr(module, "_shortest", lambda product: 0.01)
    assert measure_library("numpy", 1) == {"fp32": pytest.approx(200**3 / 0.01)}
    # A library that is slow at a format is not asked for larger matrices.
    monkeypatch.setattr(module, "_shortest", lambda product: 1.0)
    assert measure_library("numpy", 1) == {"fp32": pytest.approx(100**3)}
    monkeypatch.setattr(module, "_onnx_product", lambda *arguments: print)
    slow = measure_library("onnxruntime", 1)
    assert slow == dict.fromkeys(("fp32", "fp16", "int8"), pytest.approx(100**3))


def test_a_library_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(command: list[str], **keywords: Any) -> Any:
        seen.append(command[3])
        assert keywords["env"]["OPENBLAS_NUM_THREADS"] == "3"
        if command[3] == "torch":
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"fp32": 1.0}), "")

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.ask_libraries(3) == {"numpy": {"fp32": 1.0}, "onnxruntime": {"fp32": 1.0}}
    assert seen == list(module.LIBRARIES)


def test_a_process_of_its_own_answers_in_json() -> None:
    # Matrices of the real sizes, but only numpy's: half a second.
    done = subprocess.run(
        [sys.executable, "-m", module.__name__, "numpy", "1"],
        capture_output=True,
        text=True,
        cwd=module.ROOT,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)) == {"fp32"}


def test_a_copy_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_copy_bytes", lambda: 8000)
    monkeypatch.setattr(module, "_time_copy", lambda shares: 0.001)
    found = copy_bandwidth(3)
    assert found["bytes_per_second"] == pytest.approx(2 * 8000 / 0.001)
    assert (found["threads"], found["array_bytes"]) == (3, 8000)
    assert found["larger_than_cache"] is False
    monkeypatch.setattr(module, "last_level_cache_bytes", lambda: 1000)
    assert copy_bandwidth(1)["larger_than_cache"] is True


def test_all_of_an_array_is_copied_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    source, target = np.arange(10.0), np.zeros(10)
    halves = zip(np.array_split(target, 3), np.array_split(source, 3), strict=True)
    assert module._time_copy(list(halves)) > 0
    np.testing.assert_array_equal(target, source)


def test_little_memory_bounds_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "last_level_cache_bytes", lambda: 300 << 20)
    monkeypatch.setattr(module, "memory_bytes", lambda: 800 << 20)
    assert module._copy_bytes() == 100 << 20
    monkeypatch.setattr(module, "memory_bytes", lambda: None)
    assert module._copy_bytes() == 300 << 20
