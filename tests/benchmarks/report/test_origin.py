from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.latency import LatencyConfig
from benchmarks.report.result import SCHEMA_VERSION, default_folder, host_kind, new_result


def test_a_result_says_how_where_when_and_with_what() -> None:
    result = new_result("latency", LatencyConfig(batch="1,2"))
    assert json.loads(json.dumps(result, default=str))["config"]["batch"] == "1,2"
    assert result["schema"] == SCHEMA_VERSION
    assert result["date"].endswith("+00:00")
    assert result["machine"]["usable_cpus"] >= 1
    assert result["machine"]["l2_bytes"] > 0
    assert result["software"]["packages"]["numpy"]
    assert set(result["git"]) == {"commit", "dirty"}


def test_folders_of_this_machine_are_not_told(tmp_path: Path) -> None:
    inside = ROOT / "artifacts" / "a.onnx"
    config = LatencyConfig(models=(tmp_path / "private" / "b.onnx", inside), out=tmp_path)
    options = new_result("latency", config)["config"]
    assert options["models"] == ["b.onnx", "artifacts/a.onnx"]
    assert "out" not in options


@pytest.mark.parametrize(
    ("board", "gpus", "kind"),
    [
        (None, [], "amd-epyc-7-r-2-cores"),
        ("NVIDIA Jetson AGX Orin", [], "nvidia-jetson-agx-orin-2-cores"),
        (None, [{"name": "NVIDIA H100"}], "nvidia-h100"),
    ],
)
def test_the_folder_is_named_after_kind_date_and_machine(
    board: str | None, gpus: list[dict[str, str]], kind: str
) -> None:
    described = {"board": board, "cpu": "AMD EPYC 7(R)", "usable_cpus": 2, "gpus": gpus}
    assert host_kind(described) == kind
    result = {"kind": "latency", "date": "2026-11-23T20:05:01+00:00", "machine": described}
    folder = default_folder(result)
    assert folder.parent == ROOT / "benchmarks" / "results"
    assert folder.name == f"latency-20261123-200501-{kind}"
