"""Result files: round trip, older and newer schemas, and files that are none."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.report.result import (
    SCHEMA_VERSION,
    default_folder,
    headline,
    host_kind,
    new_result,
    panels,
    read_result,
    write_result,
)
from efficientface_deploy.errors import ArtifactError


@dataclasses.dataclass
class Config:
    """A command's options."""

    models: tuple[Path, ...] = ()
    batch: str = "1"
    out: Path | None = None


def stored(result: Any, folder: Path) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(result))
    return path


def test_a_result_comes_back_as_it_was(full_latency: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    write_result(full_latency, path)
    assert read_result(path) == full_latency
    assert "something new" in read_result(path)


def test_paths_become_text(latency: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "latency.json"
    write_result({**latency, "config": {"out": Path("there")}}, path)
    assert read_result(path) == {**latency, "config": {"out": "there"}}
    assert [child.name for child in path.parent.iterdir()] == ["latency.json"]


def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_result({"value": float("nan")}, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_every_committed_result_can_be_read() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert paths
    for path in paths:
        result = read_result(path)
        assert headline(result) or result["kind"] in ("export", "trainings")


def test_a_newer_schema_is_named(latency: dict[str, Any], tmp_path: Path) -> None:
    latency["schema"] = SCHEMA_VERSION + 1
    with pytest.raises(ArtifactError, match=f"schema {SCHEMA_VERSION + 1}, which a newer version"):
        read_result(stored(latency, tmp_path))


def test_a_truncated_file_is_named(latency: dict[str, Any], tmp_path: Path) -> None:
    path = stored(latency, tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArtifactError, match="no JSON, or a truncated file"):
        read_result(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"schema": 2}',
        '{"schema": true, "kind": "x"}',
        '{"schema": 1, "kind": "latency"}',
        '{"schema": 1, "kind": [], "machine": {}}',
        '{"schema": 1, "kind": "latency", "machine": "fast"}',
        '{"schema": 1, "kind": "latency", "machine": {}, "cases": NaN}',
    ],
)
def test_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"expected a result of benchmarks/.*measure again"):
        read_result(path)


@pytest.mark.parametrize(("part", "kind"), [("artifacts", "export"), ("runs", "trainings")])
def test_what_another_command_reports_is_a_result(part: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({part: [], "versions": {}}))
    result = read_result(path)
    assert (result["kind"], result[part], result["goals"]) == (kind, [], [])


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ArtifactError, match="truncated"):
        read_result(path)


def test_an_older_result_gets_empty_lists(latency: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy(latency)
    del before["absent"], before["warnings"], before["goals"]
    result = read_result(stored(before, tmp_path))
    assert (result["absent"], result["warnings"], result["goals"]) == ([], [], [])


def test_a_result_says_how_where_when_and_with_what() -> None:
    result = new_result("latency", Config(batch="1,2"))
    assert json.loads(json.dumps(result, default=str))["config"]["batch"] == "1,2"
    assert result["schema"] == SCHEMA_VERSION
    assert result["date"].endswith("+00:00")
    assert result["machine"]["usable_cpus"] >= 1
    assert result["machine"]["l2_bytes"] > 0
    assert result["software"]["packages"]["numpy"]
    assert set(result["git"]) == {"commit", "dirty"}


def test_folders_of_this_machine_are_not_told(tmp_path: Path) -> None:
    inside = ROOT / "artifacts" / "a.onnx"
    config = Config(models=(tmp_path / "private" / "b.onnx", inside), out=tmp_path)
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


def test_panels_hold_the_same_work_compute_first(latency: dict[str, Any]) -> None:
    found = [
        (title, [row["model"] for row in cases])
        for title, cases in panels(latency["cases"]).items()
    ]
    assert found == [
        ("compute, batch 1", ["a.onnx", "b[1].engine"]),
        ("compute, batch 32", ["a.onnx"]),
        ("end to end", ["a.onnx"]),
    ]


def test_headline_names_a_gpu_first(latency: dict[str, Any]) -> None:
    latency["machine"]["gpus"] = [{"name": "NVIDIA H100"}]
    latency["git"] = {"commit": None, "dirty": None}
    line = headline(latency)
    assert line.startswith("NVIDIA H100 · AMD EPYC")
    assert "no commit" in line
