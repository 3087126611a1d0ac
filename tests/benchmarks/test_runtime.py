from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import runtime as bench
from benchmarks.measure.processes import Run
from efficientface_deploy.predictor import BUNDLED_ONNX, load
from efficientface_deploy.workbench.timing import Samples, speedup

SMALL = ["--starts", "3", "--seconds", "0.02", "--rounds", "3", "--input-size", "32"]
SMALL += ["--predictions", "40"]


@pytest.mark.slow
def test_one_command_measures_everything(tmp_path, capsys):
    assert bench.main([*SMALL, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "runtime.json").read_text())
    start = result["start"]
    assert start["runtime"]["calls"] == start["bare"]["calls"] == 3
    assert start["runtime"]["heavy"] == []
    assert start["runtime"]["modules"] > start["bare"]["modules"] > 100
    assert start["ratio"]["value"] == pytest.approx(
        start["runtime"]["p50_ms"] / start["bare"]["p50_ms"]
    )
    assert start["check"]["value"] == pytest.approx(
        start["runtime"]["p50_ms"] / start["unchecked"]["p50_ms"]
    )
    with load(BUNDLED_ONNX) as bundled:
        assert {row["input_size"] for row in result["calls"]} == {32, bundled.spec.input_size}
    for row in result["calls"]:
        assert row["ratio"]["value"] == pytest.approx(
            row["predictor"]["p50_ms"] / row["session"]["p50_ms"]
        )
    assert list(result["pictures"]) == [
        *("decode", "resize", "infer", "whole", "photograph_decoder", "photograph")
    ]
    for row in result["batches"]:
        assert row["batch"]["images_per_second"] == pytest.approx(32_000 / row["batch"]["p50_ms"])
    memory = result["memory"]
    assert memory["predictions"] == list(range(1, 41)) and len(memory["rss_kb"]) == 40
    table = (tmp_path / "runtime.md").read_text()
    assert all(goal["name"] in table for goal in result["goals"])
    assert "wrote runtime.json and runtime.md" in capsys.readouterr().out


def test_a_heavy_library_would_be_found():
    samples = Samples(np.full((3, 1), 2_000_000))
    runs = [Run("label", 1, 2, 50_000, frozenset({"onnx", "numpy"}))]
    row = bench.describe_start(samples, [*runs, Run("label", 1, 2, 60_000, frozenset({"numpy"}))])
    assert (row["heavy"], row["modules"]) == (["onnx"], 2)
    assert row["peak_mb"] == pytest.approx(61.44)


def test_growth_is_the_slope_once_settled():
    counts = list(range(1000, 101_000, 1000))
    start = [50_000 + 300 * number for number in range(20)]  # left out
    steady = [60_000 + 3 * number for number in range(80)]
    found = bench.growth(counts, start + steady)
    assert found["kb_per_thousand"] == pytest.approx(3)
    assert (found["settled_kb"], found["end_kb"]) == (60_000, 60_237)
    assert bench.growth(counts, [60_000] * 100)["kb_per_thousand"] == pytest.approx(0, abs=1e-9)


def test_goals_say_what_was_missed():
    slow = Samples(np.full((3, 4), 3_000_000))
    quick = Samples(np.full((3, 4), 2_000_000))
    start = {
        "runtime": {"peak_mb": 90.0, "heavy": ["torch"]},
        "ratio": speedup(slow, quick),
        "check": speedup(quick, quick),
    }
    calls = [{"input_size": 224, "threads": 1, "ratio": speedup(quick, quick)}]
    pictures = {
        name: {"p50_ms": value}
        for name, value in {"photograph_decoder": 1.0, "infer": 1.5, "photograph": 3.5}.items()
    }
    result = {"start": start, "calls": calls, "memory": {"kb_per_thousand": -0.1}}
    goals = bench.goals({**result, "pictures": pictures})
    assert [goal["met"] for goal in goals] == [False, True, True, False, True, False, True]
    assert goals[5]["found"] == pytest.approx(1.4)
    assert goals[0]["found"] == pytest.approx(1.5)
