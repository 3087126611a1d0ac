"""The floor: multiply-adds counted, and the distance from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import roofline as module
from benchmarks.measure.models import Contender, open_contenders
from benchmarks.measure.roofline import (
    count_multiply_adds,
    count_onnx,
    fewest_multiply_adds,
    floor_of,
)

CEILINGS: dict[str, Any] = {
    "arithmetic": [{"threads": 1, "format": "fp32", "multiply_adds_per_second": 1e9}],
    "bandwidth": [{"threads": 1, "bytes_per_second": 1e9}],
}


@pytest.fixture
def contenders(make_onnx: Callable[..., Path], student: Path) -> Any:
    paths = [make_onnx("a.onnx", precision="fp32"), student]
    with open_contenders(paths, ("onnx:cpu", "torch:cpu"), (1,)) as (opened, _):
        yield opened


def test_an_onnx_file_and_a_checkpoint_are_counted(contenders: list[Contender]) -> None:
    counts = count_multiply_adds(contenders)
    # The colour network: one Gemm of 3 by 7.
    assert counts["a.onnx"] == 21
    # EfficientFace at 32x32, from its own layers: 1/49 of 224x224's 149.7 M but for the gates.
    assert 2.5e6 < (counts["student.safetensors"] or 0) < 4e6


def test_a_checkpoints_count_is_that_of_its_traced_graph(model_files: dict[str, Path]) -> None:
    with open_contenders([model_files["torch"]], ("torch:cpu",), (1,)) as (opened, _):
        (counted,) = count_multiply_adds(opened).values()
    assert counted == count_onnx(model_files["onnx"])


def test_the_fewest_of_a_networks_files_count(contenders: list[Contender]) -> None:
    fewest = fewest_multiply_adds(contenders, {"a.onnx": 50, "student.safetensors": 20})
    # Both say that they are the same network (name, input size, classes).
    assert list(fewest.values()) == [20]
    assert fewest_multiply_adds(contenders, {"a.onnx": None, "student.safetensors": None}) == {}


def test_distance_is_the_median_by_the_time_at_the_peak(contenders: list[Contender]) -> None:
    first = contenders[0]
    fewest = fewest_multiply_adds(contenders, {"a.onnx": 2_000_000})
    row = floor_of(first, 8, 24.0, fewest, CEILINGS)
    assert row is not None
    assert row["ms"] == pytest.approx(16.0)  # 8 x 2 M at 1 G a second
    assert row["distance"] == pytest.approx(1.5)
    size = first.predictor.path.stat().st_size + 8 * 32 * 32 * 3
    assert row["memory_ms"] == pytest.approx(1e3 * size / 1e9)


def test_without_count_or_peak_there_is_no_floor(contenders: list[Contender]) -> None:
    first = contenders[0]
    assert floor_of(first, 1, 1.0, {}, CEILINGS) is None
    fewest = fewest_multiply_adds(contenders, {"a.onnx": 10})
    assert floor_of(first, 1, 1.0, fewest, {"arithmetic": [], "bandwidth": []}) is None


def test_a_gpu_has_its_own_peak(
    contenders: list[Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    fewest = fewest_multiply_adds(contenders, {"a.onnx": 1_000_000})
    monkeypatch.setattr(Contender, "on_gpu", True)
    assert floor_of(contenders[0], 1, 1.0, fewest, CEILINGS) is None
    gpu = {**CEILINGS, "gpu": {"fp32": 1e10}}
    row = floor_of(contenders[0], 1, 1.0, fewest, gpu)
    assert row is not None and row["ms"] == pytest.approx(0.1)


def test_without_the_package_onnx_a_file_has_no_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert count_onnx(tmp_path / "any.onnx") is None
