from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from benchmarks import ROOT
from benchmarks.report.__main__ import main
from benchmarks.report.kinds import TABLES, tables_of
from benchmarks.report.plots import latency_plot
from benchmarks.report.publish import METHOD
from benchmarks.report.result import TIMED, damage_named, headline, read_result, write_result
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ArtifactError

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
RESULTS_OF = {
    kind: [path for path in RESULTS if path.parent.name.startswith(kind)] for kind in TABLES
}


def test_command_shows_a_stored_result(
    latency: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "latency.json"
    write_result(latency, stored)
    assert main([str(stored)]) == 0
    assert "compute, batch 1" in capsys.readouterr().out


def test_command_writes_one_report_of_several_results(
    full_latency: dict[str, Any],
    accuracy: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [tmp_path / "latency.json", tmp_path / "accuracy.json"]
    for path, result in zip(paths, (full_latency, accuracy), strict=True):
        write_result(result, path)
    out = tmp_path / "report"
    assert main([*map(str, paths), "--out", str(out)]) == 0
    assert "wrote report.md and its plots" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"report.md", "latency-1.png"}
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "## Latency, 2026-11-23" in text and "## Accuracy, 2026-11-23" in text
    assert 0 < text.index("x roofline at most") < text.index("| a.onnx |")  # goals first
    assert "](latency-1.png)" in text
    for part in ("AMD EPYC", "Cold start", "87.65", "> Warning: the machine was noisy", METHOD):
        assert part in text
    with Image.open(out / "latency-1.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_every_committed_result_becomes_a_report(path: Path, tmp_path: Path) -> None:
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.count("\n|") > 3 and "may not be concluded" in text


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


def refuse(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that exits 2 prints."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(argv))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "something else"),
        ("cases", None),
        ("cases", [{"model": "a"}]),
        ("cold", [{"model": "a"}]),
        ("ceilings", 3),
        ("profiles", {"kinds": 1}),
        ("models", ["a.onnx"]),
        ("goals", 7),
        ("machine", "fast"),
        ("absent", ["trt"]),
        ("warnings", 3),
    ],
)
def test_a_damaged_part_is_one_line_and_nothing_is_written(
    key: str,
    value: object,
    full_latency: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = tmp_path / "latency.json"
    write_result({**full_latency, key: value}, stored)
    printed = refuse([str(stored), "--out", str(tmp_path / "out")], capsys)
    assert "latency.json: expected a result of benchmarks/" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("p50_ms", value) for value in (None, "fast", float("nan"), -1.0, [1], {})),
        *((key, None) for key in ("min_ms", "p90_ms", "p99_ms", "batch")),
        ("batch", [1]),
    ],
)
def test_a_row_that_cannot_be_shown_is_one_line(
    key: str,
    value: object,
    latency: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = tmp_path / "latency.json"
    latency["cases"][1][key] = value
    stored.write_text(json.dumps(latency))
    printed = refuse([str(stored), "--out", str(tmp_path / "out")], capsys)
    assert "latency.json: expected a result of benchmarks/" in printed
    assert not (tmp_path / "out").exists()


def places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys or indices."""
    if isinstance(part, (dict, list)):
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            yield part, key
            yield from places(part[key])


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_no_damage_ends_in_a_traceback(kind: str, tmp_path: Path) -> None:
    (path, *_) = RESULTS_OF[kind]
    whole = json.loads(path.read_text())
    stored, random = tmp_path / path.name, Random(0)
    for number in range(100):
        result = copy.deepcopy(whole)
        part, key = random.choice(list(places(result)))
        part[key] = random.choice([None, True, 0, 3, -1.5, "x", [], {}, [None], [{}], {"x": []}])
        stored.write_text(json.dumps(result))
        with contextlib.suppress(ArtifactError):
            found = read_result(stored)
            with damage_named(stored):
                headline(found), tables_of(found)
                if kind in TIMED and number % 20 == 0:
                    latency_plot(found)
