from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import report
from benchmarks.report import (
    console,
    headline,
    main,
    panels,
    plot_latency,
    read_result,
    require_libraries,
    show,
    write_result,
)
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ArtifactError, ConfigError

HEAD: dict[str, Any] = {
    "schema": 1,
    "date": "2026-11-23T20:05:01+00:00",
    "machine": {"board": None, "cpu": "AMD EPYC", "usable_cpus": 2, "gpus": []},
    "software": {"os": "Debian", "python": "3.11.7", "packages": {"onnxruntime": "1.32.0"}},
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "config": {},
    "absent": [
        {"backend": "trt", "model": "", "reason": "pip install 'efficientface-deploy[trt]'"},
        {"backend": "onnx:cuda", "model": "a.onnx", "reason": "no provider"},
        {"backend": "onnx:cuda", "model": "b.onnx", "reason": "no provider"},
    ],
    "warnings": ["the machine was busy: [3 of 4]"],
}


def case(model: str, stage: str, batch: int, **changes: Any) -> dict[str, Any]:
    times = {"min_ms": 0.9, "p50_ms": 1.0, "p90_ms": 1.2, "p99_ms": 2.0}
    fixed = {"backend": "onnx:cpu", "precision": "fp32", "threads": 1, "busy": False}
    fixed |= {"images_per_second": 1234.5, "speedup": {"value": 2.0, "low": 1.9, "high": 2.1}}
    return {"model": model, "stage": stage, "batch": batch, **fixed, **times, **changes}


@pytest.fixture
def latency() -> dict[str, Any]:
    cases = [
        case("a.onnx", "compute", 1),
        case("a.onnx", "compute", 32),
        case("a.onnx", "end to end", 1),
        case("b[1].engine", "compute", 1, backend="trt", threads=None, speedup=None),
    ]
    return {**copy.deepcopy(HEAD), "kind": "latency", "baseline": "a.onnx", "cases": cases}


@pytest.fixture
def accuracy() -> dict[str, Any]:
    row = {"model": "a.onnx", "backend": "onnx:cpu", "precision": "", "bytes": 5 * 2**20}
    row |= {"accuracy": 0.8765, "macro_f1": 0.7, "ece": 0.05, "agreement": 1.0}
    row |= {"mean_kl": 1.5e-7, "max_probability_difference": 0.002}
    data = {"name": "FER+", "split": "validation", "images": 3191}
    return {
        **copy.deepcopy(HEAD),
        "kind": "accuracy",
        "data": data,
        "reference": "a.onnx on onnx:cpu",
        "rows": [row],
    }


def printed(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    show(result, console())
    return capsys.readouterr().out


def test_round_trip(latency: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "latency.json"
    write_result({**latency, "config": {"out": Path("there")}}, path)
    assert read_result(path) == {**latency, "config": {"out": "there"}}
    assert [child.name for child in path.parent.iterdir()] == ["latency.json"]


def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_result({"value": float("nan")}, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": 1, "kind": "latency"}',
        '{"schema": 99, "kind": "latency", "cases": []}',
        '{"schema": 1, "kind": [], "cases": []}',
    ],
)
def test_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="measure again"):
        read_result(path)


def test_panels_hold_the_same_work_compute_first(latency: dict[str, Any]) -> None:
    found = [(title, [row["model"] for row in cases]) for title, cases in panels(latency["cases"])]
    assert found == [
        ("compute, batch 1", ["a.onnx", "b[1].engine"]),
        ("compute, batch 32", ["a.onnx"]),
        ("end to end", ["a.onnx"]),
    ]


def test_latency_is_printed(latency: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(latency, capsys)
    for part in (
        "AMD EPYC, 2 CPUs",
        "onnxruntime 1.32.0",
        "012345678+changes",
        "compute, batch 32",
        "b[1].engine",
        "2.00 (1.90 to 2.10)",
        "1234",
        "pip install 'efficientface-deploy[trt]'",
        "a.onnx, b.onnx",
        "warning: the machine was busy: [3 of 4]",
    ):
        assert part in text


def test_accuracy_is_printed(accuracy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(accuracy, capsys)
    for part in ("FER+, validation split, 3191 images", "87.65", "1.5e-07", "0.002", "5.00"):
        assert part in text


def test_headline_names_a_gpu_first(latency: dict[str, Any]) -> None:
    latency["machine"]["gpus"] = [{"name": "NVIDIA H100"}]
    latency["git"] = {"commit": None, "dirty": None}
    line = headline(latency)
    assert line.startswith("NVIDIA H100 · AMD EPYC")
    assert "no commit" in line


@pytest.mark.parametrize("count", [1, 2, 4])
def test_plot_is_a_png(latency: dict[str, Any], count: int, tmp_path: Path) -> None:
    latency["cases"] = latency["cases"][:count]
    latency["cases"][0]["busy"] = True
    path = tmp_path / "latency.png"
    plot_latency(latency, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 500
    assert [child.name for child in tmp_path.iterdir()] == ["latency.png"]


def test_command_shows_and_draws_a_stored_result(
    latency: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "latency.json"
    write_result(latency, stored)
    assert main([str(stored), "--plot", str(tmp_path / "again.png")]) == 0
    assert "compute, batch 1" in capsys.readouterr().out
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses_to_plot_accuracy(
    accuracy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "accuracy.json"
    stored.write_text(json.dumps(accuracy))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([str(stored), "--plot", str(tmp_path / "x.png")]))
    assert stop.value.code == 2
    assert "--plot: expected a latency result, found accuracy" in capsys.readouterr().err


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_libraries()
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no rich and no matplotlib.*deploy\[bench\]"):
        require_libraries()
