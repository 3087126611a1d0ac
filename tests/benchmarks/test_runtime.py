from __future__ import annotations

import json
import os

import numpy as np
import pytest

from benchmarks import probe
from benchmarks import runtime as bench
from benchmarks.measure.inputs import make_jpegs
from efficientface_deploy.workbench.timing import Samples

SMALL = ["--starts", "3", "--seconds", "0.02", "--rounds", "3", "--input-size", "32"]
SMALL += ["--predictions", "40", "--settings", "1"]


@pytest.fixture
def few_settings(monkeypatch):
    settings = [bench.Setting(), bench.Setting(threads=1, arena=False)]
    monkeypatch.setattr(bench, "plan_settings", lambda: settings)


def test_one_command_measures_everything(few_settings, tmp_path, capsys):
    assert bench.main([*SMALL, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "runtime.json").read_text())
    start = result["start"]
    assert start["runtime"]["count"] == start["bare"]["count"] == 3
    assert start["runtime"]["heavy"] == []
    assert start["runtime"]["modules"] > start["bare"]["modules"] > 100
    assert start["ratio"]["value"] == pytest.approx(
        start["runtime"]["p50_ms"] / start["bare"]["p50_ms"]
    )
    assert {row["input_size"] for row in result["calls"]} == {32, bench.bundled_side()}
    for row in result["calls"]:
        assert row["ratio"]["value"] == pytest.approx(
            row["predictor"]["p50_ms"] / row["session"]["p50_ms"]
        )
    assert list(result["pictures"]) == ["decode", "resize", "infer", "whole"]
    for row in result["batches"]:
        assert row["batch"]["images_per_second"] == pytest.approx(32_000 / row["batch"]["p50_ms"])
    memory = result["memory"]
    assert memory["predictions"] == list(range(1, 41)) and len(memory["rss_kb"]) == 40
    assert [row["name"] for row in result["settings"]] == [
        "the library's defaults",
        "1 threads, no arena",
    ]
    table = (tmp_path / "runtime.md").read_text()
    assert all(goal["name"] in table for goal in result["goals"])
    assert "wrote runtime.json and runtime.md" in capsys.readouterr().out


def test_peak_of_a_start_is_its_own(tmp_path):
    """What ``wait4`` reports would be at least the memory of this process."""
    ballast = np.ones(400 << 20, dtype=np.uint8)
    took, peak_kb, modules = bench.start_once("print('label', flush=True)", tmp_path)
    assert took > 0 and "numpy" not in modules and "site" in modules
    assert peak_kb < 100 << 10 < ballast.nbytes >> 10


def test_heavy_library_would_be_found(tmp_path):
    _, _, modules = bench.start_once("import onnx; print('label', flush=True)", tmp_path)
    assert modules & set(bench.HEAVY) == {"onnx"}


def test_start_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError, match="no label"):
        bench.start_once("raise SystemExit(3)", tmp_path)
    with pytest.raises(RuntimeError, match="KeyError"):
        bench.probe("no such job", {}, tmp_path)


def test_bytecode_is_compiled_outside_of_the_tree(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    script = "import efficientface_deploy; print('label', flush=True)"
    bench.start_once(script, tmp_path)
    assert list((tmp_path / "bytecode").rglob("predictor.*.pyc"))


def test_growth_is_the_slope_once_settled():
    counts = list(range(1000, 101_000, 1000))
    start = [50_000 + 300 * number for number in range(20)]  # left out
    steady = [60_000 + 3 * number for number in range(80)]
    found = bench.growth(counts, start + steady)
    assert found["kb_per_thousand"] == pytest.approx(3)
    assert (found["settled_kb"], found["end_kb"]) == (60_000, 60_237)
    assert bench.growth(counts, [60_000] * 100)["kb_per_thousand"] == pytest.approx(0, abs=1e-9)


LEAK = """
import json, sys
from benchmarks import probe
from efficientface_deploy import Predictor
kept, call = [], Predictor.__call__
def leaking(self, image):
    kept.append(bytearray(b"x" * 100_000))
    return call(self, image)
Predictor.__call__ = leaking
print(json.dumps(probe.predict_often(json.loads(sys.argv[1]))))
"""


def test_memory_that_is_kept_is_seen(tmp_path, run_python):
    """100 kB at each prediction."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(make_jpegs(0)[0])
    job = {"predictions": 300, "samples": 60, "photo": str(photo), "threads": 1}
    done = run_python(LEAK, json.dumps(job))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    growth = bench.growth(found["predictions"], found["rss_kb"])
    assert growth["kb_per_thousand"] == pytest.approx(100_000, rel=0.2)


def test_settings_reach_the_library(tmp_path):
    job = {"model": str(bench.BUNDLED_ONNX), "side": bench.bundled_side(), "calls": 4}
    job["pause_s"] = 0.001
    setting = {"threads": 1, "arena": False, "level": "basic", "spinning": False}
    found = probe.run_with_setting({**job, **setting})
    assert len(found["calls_ms"]) == 4 and len(found["paced_ms"]) == 1
    assert 0 < found["rss_kb"] <= found["batch_peak_kb"]
    with pytest.raises(KeyError):
        probe.run_with_setting({**job, **setting, "level": "most"})


def test_goals_say_what_was_missed():
    slow = Samples(np.full((3, 4), 3_000_000))
    quick = Samples(np.full((3, 4), 2_000_000))
    start = {
        "runtime": {"peak_mb": 90.0, "heavy": ["torch"]},
        "ratio": bench.ratio(slow, quick),
    }
    calls = [{"input_size": 224, "threads": 1, "ratio": bench.ratio(quick, quick)}]
    goals = bench.judge({"start": start, "calls": calls, "memory": {"kb_per_thousand": -0.1}})
    assert [goal["met"] for goal in goals] == [False, True, False, True, True]
    assert goals[0]["found"] == pytest.approx(1.5)


def test_memory_of_a_process():
    assert 1000 < probe.memory_kb(probe.RSS) <= probe.memory_kb(probe.PEAK_RSS)
    assert probe.memory_kb(probe.RSS, os.getppid()) > 0
