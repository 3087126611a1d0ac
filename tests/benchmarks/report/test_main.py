from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.report import tables
from benchmarks.report.__main__ import (
    headline,
    main,
    panels,
    plot_latency,
    read_result,
    write_result,
)
from benchmarks.report.tables import console, require_libraries, show
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ArtifactError, ConfigError


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


def test_command_writes_markdown_and_a_page_of_several_results(
    latency: dict[str, Any],
    accuracy: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [tmp_path / "latency.json", tmp_path / "accuracy.json"]
    for path, result in zip(paths, (latency, accuracy), strict=True):
        write_result(result, path)
    out = tmp_path / "page"
    assert main([*map(str, paths), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"report.md", "report.html"}
    for path in out.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "Latency, 2026-11-23" in text and "Accuracy, 2026-11-23" in text
    assert "wrote report.md and report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "RESULT: expected a result"),
        (["{0}", "{0}", "--compare", "{0}"], "--compare: expected one result"),
        (["{0}", "--fail-on-regression"], "--fail-on-regression: expected --compare OLD"),
        (["{0}", "--tolerance", "-1"], "--tolerance: expected at least 0"),
        (["/nowhere.json"], "/nowhere.json: expected a benchmark's result, found no such file"),
        (["{1}"], "found no JSON, or a truncated file"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    argv: list[str],
    message: str,
    latency: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored, broken = tmp_path / "latency.json", tmp_path / "broken.json"
    write_result(latency, stored)
    broken.write_text('{"schema": 1,')
    given = [word.format(stored, broken) for word in argv]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([*given, "--out", str(tmp_path / "out")]))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cold", [{"model": "a"}]),
        ("ceilings", 3),
        ("profiles", {"kinds": 1}),
        ("models", ["a.onnx"]),
        ("goals", 7),
        ("machine", "fast"),
        ("absent", ["trt"]),
    ],
)
def test_a_damaged_part_is_one_line_and_nothing_is_written(
    key: str,
    value: object,
    latency: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = tmp_path / "latency.json"
    write_result({**latency, key: value}, stored)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([str(stored), "--out", str(tmp_path / "out")]))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "latency.json: expected a result of benchmarks/" in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_libraries()
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no rich and no matplotlib.*deploy\[bench\]"):
        require_libraries()
