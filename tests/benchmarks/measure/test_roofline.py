"""The roofline: multiply-adds counted, the machine's peak, and the distance from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import roofline as module
from benchmarks.measure.models import Candidate, open_candidates
from benchmarks.measure.processes import ProcessError, run_fresh, run_job
from benchmarks.measure.roofline import (
    count_multiply_adds,
    count_onnx,
    fewest_multiply_adds,
    measure_library,
    peak_rate,
    roofline_of,
)
from efficientface_deploy.models import load_checkpoint

KNOWN: dict[str, Any] = {
    "arithmetic": [{"threads": 1, "format": "fp32", "multiply_adds_per_second": 1e9}],
}


@pytest.fixture
def candidates(make_onnx: Callable[..., Path], student: Path) -> Any:
    paths = [make_onnx("a.onnx", precision="fp32"), student]
    with open_candidates(paths, ("onnx:cpu", "torch:cpu"), (1,)) as (opened, _):
        yield opened


def test_an_onnx_file_and_a_checkpoint_are_counted(candidates: list[Candidate]) -> None:
    counts = count_multiply_adds(candidates)
    # The colour network: one Gemm of 3 by 7.
    assert counts["a.onnx"] == 21
    # EfficientFace at 32x32, from its own layers: 1/49 of 224x224's 149.7 M but for the gates.
    assert 2.5e6 < (counts["student.safetensors"] or 0) < 4e6


@pytest.mark.slow
def test_a_checkpoints_count_is_that_of_its_traced_graph(
    model_files: dict[str, Path], tmp_path: Path
) -> None:
    from efficientface_export.graph.trace import export_onnx

    traced = export_onnx(*load_checkpoint(model_files["torch"]), tmp_path / "traced.onnx")
    with open_candidates([model_files["torch"]], ("torch:cpu",), (1,)) as (opened, _):
        (counted,) = count_multiply_adds(opened).values()
    assert counted == count_onnx(traced)


def test_the_fewest_of_a_networks_files_count(candidates: list[Candidate]) -> None:
    fewest = fewest_multiply_adds(candidates, {"a.onnx": 50, "student.safetensors": 20})
    # Both say that they are the same network (name, input size, classes).
    assert list(fewest.values()) == [20]
    assert fewest_multiply_adds(candidates, {"a.onnx": None, "student.safetensors": None}) == {}


def test_distance_is_the_median_by_the_time_at_the_peak(candidates: list[Candidate]) -> None:
    first = candidates[0]
    fewest = fewest_multiply_adds(candidates, {"a.onnx": 2_000_000})
    row = roofline_of(first, 8, 24.0, fewest, KNOWN)
    assert row is not None
    assert row["ms"] == pytest.approx(16.0)  # 8 x 2 M at 1 G a second
    assert row["distance"] == pytest.approx(1.5)


def test_without_count_or_peak_there_is_no_floor(candidates: list[Candidate]) -> None:
    first = candidates[0]
    assert roofline_of(first, 1, 1.0, {}, KNOWN) is None
    fewest = fewest_multiply_adds(candidates, {"a.onnx": 10})
    assert roofline_of(first, 1, 1.0, fewest, {"arithmetic": []}) is None


def test_a_gpu_has_its_own_peak(
    candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    fewest = fewest_multiply_adds(candidates, {"a.onnx": 1_000_000})
    monkeypatch.setattr(Candidate, "on_gpu", True)
    assert roofline_of(candidates[0], 1, 1.0, fewest, KNOWN) is None
    gpu = {**KNOWN, "gpu": {"fp32": 1e10}}
    row = roofline_of(candidates[0], 1, 1.0, fewest, gpu)
    assert row is not None and row["ms"] == pytest.approx(0.1)


def test_without_the_package_onnx_a_file_has_no_count(
    candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_installed", lambda name: False)
    assert count_multiply_adds(candidates[:1]) == {"a.onnx": None}


# ---- the machine's peak: which of the libraries and formats counts

PEAKS: dict[str, Any] = {
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
    monkeypatch.setattr(module, "_SIZES", {"cpu": (16, 32)})
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
    assert peak_rate(PEAKS, threads, precision) == expected


def test_fewer_threads_than_were_measured_have_no_peak_rate() -> None:
    only_two = {"arithmetic": PEAKS["arithmetic"][3:]}
    assert peak_rate(only_two, 1, "fp32") is None


def test_a_row_names_the_best_of_the_libraries_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = {"numpy": {"fp32": 5.0}, "onnxruntime": {"fp32": 7.0, "fp16": 3.0}}

    def run_job(job: Any, library: str, threads: int, *, environment: dict[str, str]) -> Any:
        assert (threads, environment["OPENBLAS_NUM_THREADS"]) == (2, "2")
        if library == "torch":
            raise ProcessError("ModuleNotFoundError: No module named 'torch'")
        return rates[library]

    monkeypatch.setattr(module, "run_job", run_job)
    first, second = module.measure_arithmetic(2)
    assert first == {
        **{"threads": 2, "format": "fp32", "multiply_adds_per_second": 7.0, "by": "onnxruntime"},
        "tried": {"numpy": 5.0, "onnxruntime": 7.0},
    }
    assert (second["format"], second["tried"]) == ("fp16", {"onnxruntime": 3.0})


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
    monkeypatch.setattr(module, "_SIZES", {"cpu": (100, 200)})
    monkeypatch.setattr(module, "_shortest", lambda product: 0.01)
    assert measure_library("numpy", 1) == {"fp32": pytest.approx(200**3 / 0.01)}
    # A library that is slow at a format is not asked for larger matrices.
    monkeypatch.setattr(module, "_shortest", lambda product: 1.0)
    assert measure_library("numpy", 1) == {"fp32": pytest.approx(100**3)}
    monkeypatch.setattr(module, "_onnx_product", lambda *arguments: print)
    slow = measure_library("onnxruntime", 1)
    assert slow == dict.fromkeys(("fp32", "fp16", "int8"), pytest.approx(100**3))


def test_a_process_measures_one_library_and_imports_no_other() -> None:
    # Matrices of the real sizes, but only numpy's: half a second.
    assert set(run_job(measure_library, "numpy", 1)) == {"fp32"}
    run = run_fresh("import benchmarks.measure.roofline; print('imported')")
    assert not run.modules & {"torch", "onnx", "onnxruntime"}


def test_a_machine_without_a_gpu_has_no_peak_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_arithmetic", lambda threads: [{"threads": threads}])
    assert module.measure_peaks((1, 2)) == {"arithmetic": [{"threads": 1}, {"threads": 2}]}
    assert module.measure_peaks((), gpu=True) == {"arithmetic": [], "gpu": {}}
