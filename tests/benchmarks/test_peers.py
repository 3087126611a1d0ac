from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import peers as bench
from benchmarks.measure import toolchains
from benchmarks.measure.networks import MAX_DIFFERENCE
from benchmarks.measure.toolchains import (
    ONNXRUNTIME,
    OURS,
    Toolchain,
    UnavailableError,
    Work,
)
from benchmarks.report.kinds import tables_of
from efficientface_deploy.errors import ConfigError, install_command
from efficientface_deploy.workbench import requirements
from efficientface_deploy.workbench.timing import Samples

SMALL = bench.PeersConfig(
    networks=False, input_size=32, batch=3, seconds=0.02, rounds=3, libraries="onnxruntime"
)
LATENCY_KEYS = {
    *("model", "backend", "precision", "threads", "stage", "batch", "calls", "min_ms", "p50_ms"),
    *("p90_ms", "p99_ms", "images_per_second", "round_medians_ms", "spread", "drift", "busy"),
    "speedup",
}

pytestmark = pytest.mark.usefixtures("quick_export", "threads_as_before")


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    """PyTorch's second thread is very slow where others use the CPU too."""
    monkeypatch.setattr(bench, "usable_cpus", lambda: 1)
    monkeypatch.setattr(bench, "_PAUSE", 0)


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    """Measuring it takes processes of their own."""
    row = {"threads": 1, "format": "fp32", "multiply_adds_per_second": 6e10}
    monkeypatch.setattr(bench, "measure_arithmetic", lambda threads: [row])


@pytest.fixture
def beside_ours(monkeypatch):
    """Compare with these toolchains instead of the real ones."""

    def compare_with(*made: Toolchain) -> None:
        monkeypatch.setattr(bench, "TOOLCHAINS", (OURS[0], *made))

    return compare_with


def fake(name, open_, **fields):
    return Toolchain(name, "onnxruntime", open_, "as it is", **fields)


def changed_by(share):
    """ONNX Runtime with an error in each logit."""

    def open_(*arguments):
        infer = toolchains.open_onnxruntime(*arguments)
        return lambda pictures: infer(pictures) * np.float32(1 + share)

    return open_


def rows_by_name(result, batch=1):
    return {row["backend"]: row for row in result["cases"] if row["batch"] == batch}


def test_result_compares_every_toolchain_with_ours(tmp_path, capsys):
    arguments = ["--input-size", "32", "--batch", "3", "--seconds", "0.02", "--rounds", "3"]
    arguments += ["--libraries", "onnxruntime", "--no-networks", "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    result = json.loads((tmp_path / "peers.json").read_text())
    for row in result["cases"]:
        assert set(row) > LATENCY_KEYS
        assert row["group"] == bench.SAME and row["note"] == ""
        assert row["ranked"] and row["max_difference"] < MAX_DIFFERENCE
        assert 0 < row["cpus"] <= 1.1
        assert row["ours_faster"]["value"] == pytest.approx(1 / row["speedup"]["value"])
    single, batch = rows_by_name(result), rows_by_name(result, batch=3)
    ours, other = single[OURS[0].name], single[ONNXRUNTIME.name]
    assert len(single) == 2 and len(batch) == 4  # a picture to each thread is for batches
    assert ours["ours_faster"]["value"] == 1
    assert other["ours_faster"]["value"] == pytest.approx(other["p50_ms"] / ours["p50_ms"])
    table = (tmp_path / "peers.md").read_text()
    assert "| **compute, batch 1** |" in table and "| **compute, batch 3** |" in table
    assert f"| {ONNXRUNTIME.name} | {ONNXRUNTIME.setting} |" in table
    assert "wrote peers.json and peers.md" in capsys.readouterr().out


def test_goals_name_what_they_were_measured_against(beside_ours):
    beside_ours(ONNXRUNTIME)
    result = bench.run(SMALL)
    goals = {entry["goal"]: entry for entry in result["goals"]}
    best = goals["faster than the best peer on the same network"]
    assert best["against"] == "EfficientFace on ONNX Runtime"
    assert best["met"] == (best["reached"]["value"] >= 1.2)
    floor = goals["at most this many times the arithmetic floor"]
    floor_ms = 1e3 * result["multiply_adds"] / result["peak_multiply_adds_per_second"]
    ours = rows_by_name(result)[OURS[0].name]
    assert floor["reached"]["value"] == pytest.approx(ours["p50_ms"] / floor_ms)
    for missing in ("faster than PyTorch eager", "faster than EfficientNet-B0 on ONNX Runtime"):
        assert goals[missing]["met"] is None and goals[missing]["against"] == "not measured"


def test_wrong_outputs_are_marked_and_not_ranked(beside_ours):
    beside_ours(
        fake("wrong", lambda *_: lambda pictures: np.ones((len(pictures), 7), np.float32)),
        fake("nearly right", changed_by(0.001)),
        fake("right", changed_by(0)),
        fake("other shape", lambda *_: lambda pictures: np.ones((len(pictures), 6), np.float32)),
    )
    result = bench.run(SMALL)
    rows = rows_by_name(result)
    for name in ("wrong", "nearly right", "other shape"):
        assert not rows[name]["ranked"]
        assert "computes something else" in rows[name]["note"]
    assert rows["other shape"]["max_difference"] is None
    assert rows["right"]["ranked"] and rows["right"]["note"] == ""
    best = result["goals"][0]
    assert best["against"] == "EfficientFace on right"  # not "wrong", which takes no time at all
    assert "not ranked: it computes something else" in tables_of(result)[1].to_markdown()


def test_what_is_missing_or_fails_is_listed_with_its_reason(beside_ours, monkeypatch):
    def fail(*arguments):
        raise OSError("libsomething.so.1: cannot open shared object file")

    def refuse(*arguments):
        raise UnavailableError("its converter failed")

    beside_ours(
        fake("not installed", fail, needs=("torch", "ncnn")),
        fake("broken", fail),
        fake("refusing", refuse),
    )
    monkeypatch.setattr(requirements, "is_installed", lambda name: name != "ncnn")
    result = bench.run(SMALL)
    absent = [(entry["backend"], entry["reason"]) for entry in result["absent"]]
    broken = "OSError: libsomething.so.1: cannot open shared object file"
    assert absent == [
        ("not installed", f"no ncnn here; {install_command('peers')}"),
        ("broken", f"batch 1, 1 thread: {broken}"),
        ("refusing", "its converter failed"),
        ("broken", f"batch 3, 1 thread: {broken}"),
    ]
    assert set(rows_by_name(result)) == {OURS[0].name}


def test_unknown_library():
    with pytest.raises(ConfigError, match=r"--libraries: expected pytorch, .*, found 'tvm'"):
        bench.choose_toolchains("ncnn,tvm")


def test_rows_with_too_many_threads_are_not_ranked(beside_ours, monkeypatch):
    beside_ours(ONNXRUNTIME)

    def measure(candidates, **options):
        times = np.full((3, 4), 1_000_000)
        return {name: Samples(times, 1.4 if "ONNX" in name else 1.05) for name in candidates}

    monkeypatch.setattr(bench, "measure", measure)
    rows = rows_by_name(bench.run(SMALL))
    assert not rows[ONNXRUNTIME.name]["ranked"] and rows[ONNXRUNTIME.name]["cpus"] == 1.4
    assert rows[ONNXRUNTIME.name]["note"] == "not ranked: it used more threads than it was given"
    assert rows[OURS[0].name]["ranked"]


def test_other_networks_are_opened_by_export_and_by_pytorch(tmp_path):
    networks = [
        dataclasses.replace(bench.make_networks(SMALL, tmp_path)[0], name=name)
        for name in (bench.EFFICIENTFACE, "EfficientNet-B0")
    ]
    plan = bench.plan_cases(networks, [*OURS, ONNXRUNTIME], Work(1, 1))
    assert [(network.name, toolchain.name) for network, toolchain in plan] == [
        (bench.EFFICIENTFACE, "EfficientFace Deploy"),
        (bench.EFFICIENTFACE, "ONNX Runtime"),
        ("EfficientNet-B0", "ONNX Runtime"),
        ("EfficientNet-B0", "PyTorch eager"),
    ]
    case = bench.Case(*plan[-1], lambda pictures: pictures, 0.0)
    row = bench.describe(case, [case], Work(1, 1), {case.name: Samples(np.ones((3, 4)), 1.0)})
    assert (row["group"], row["note"]) == (bench.OTHER, bench.RANDOM_WEIGHTS) and row["ranked"]


def test_works_begin_with_one_thread(monkeypatch):
    monkeypatch.setattr(bench, "usable_cpus", lambda: 8)
    assert bench.plan_works(32) == [Work(1, 1), Work(2, 1), Work(2, 32)]
    monkeypatch.setattr(bench, "usable_cpus", lambda: 1)
    assert bench.plan_works(32) == [Work(1, 1), Work(1, 32)]
