from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from benchmarks import graph_layouts as bench
from benchmarks.graph_layouts import STRAIGHT, VARIANTS
from benchmarks.measure.networks import efficientface
from efficientface_export.graph.efficientface import deploy_graph

SMALL = ["--input-size", "32", "--seconds", "0.05", "--rounds", "3"]


@pytest.fixture
def few(monkeypatch, quick_export):
    """Three variants."""
    variants = {name: VARIANTS[name] for name in (STRAIGHT, "cpu", "gpu")}
    monkeypatch.setattr(bench, "VARIANTS", variants)
    return variants


def test_result_compares_every_graph_with_the_straight_one(few, tmp_path, capsys):
    assert bench.main([*SMALL, "--no-kernels", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "graphs.json").read_text())
    rows = {row["name"]: row for row in result["graphs"]}
    assert list(rows) == list(few)
    assert rows[STRAIGHT]["time_ratio"]["value"] == rows[STRAIGHT]["multiply_adds_ratio"] == 1
    for row in rows.values():
        assert row["time_ratio"]["value"] == pytest.approx(
            row["p50_ms"] / rows[STRAIGHT]["p50_ms"], rel=1e-6
        )
        assert row["kernels"] is None and row["calls"] >= 3
    table = (tmp_path / "graphs.md").read_text()
    assert "wrote graphs.json" in capsys.readouterr().out
    assert all(f"| {name} | {variant.expected} |" in table for name, variant in few.items())


def test_a_graph_that_computes_something_else_is_not_timed(few, monkeypatch):
    config = bench.GraphsConfig(input_size=32, seconds=0.01, rounds=3, kernels=False)

    def damaged(*arguments, **options):
        graph = deploy_graph(*arguments, **options)
        bias = next(weight for weight in graph.graph.initializer if weight.name == "conv1.bias")
        values = onnx.numpy_helper.to_array(bias) + np.float32(0.01)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return graph

    monkeypatch.setattr("benchmarks.measure.networks.deploy_graph", damaged)
    with pytest.raises(RuntimeError, match="cpu differs from straight by"):
        bench.run(config)


def test_the_goals_of_arithmetic_are_kept(tmp_path):
    """At most 1.15 times the straight graph's multiply-adds for a CPU, 1.3 times for a GPU."""
    network = efficientface(224, 0, tmp_path)
    written = bench.write_graphs(network, {name: VARIANTS[name] for name in ("cpu", "gpu")})
    straight = 149.73e6  # of the published network at 224x224, 7 classes
    assert bench.multiply_adds(written["cpu"]) <= 1.15 * straight
    assert bench.multiply_adds(written["gpu"]) <= 1.3 * straight
