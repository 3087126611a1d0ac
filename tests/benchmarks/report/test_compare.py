"""Two runs compared: what is noise, what is not, and what may not be compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.predictions import NAME, keep, write_predictions
from benchmarks.report.__main__ import main
from benchmarks.report.compare import compare, ratio_of_medians
from benchmarks.report.result import write_result
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ConfigError

ROUNDS = [0.98, 0.99, 1.0, 1.0, 1.01, 1.02]


@pytest.fixture
def pair(latency: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write a result and the same one with its first row ``factor`` times slower."""

    def write(factor: float, **machine: Any) -> tuple[Path, Path]:
        for row in latency["cases"]:
            row["round_medians_ms"] = ROUNDS
        newer = copy.deepcopy(latency)
        row = newer["cases"][0]
        row["p50_ms"] *= factor
        row["round_medians_ms"] = [factor * value for value in ROUNDS]
        newer["machine"] |= machine
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        write_result(latency, old)
        write_result(newer, new)
        return old, new

    return write


def exit_code(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(argv))
    return stop.value.code


def test_the_ratio_has_the_interval_of_both_runs() -> None:
    old = {"p50_ms": 2.0, "round_medians_ms": [2.0] * 8}
    new = {"p50_ms": 3.0, "round_medians_ms": [3.0] * 8}
    ratio = ratio_of_medians(old, new)
    assert (ratio.value, ratio.low, ratio.high) == (1.5, 1.5, 1.5)
    # Rounds that vary by a fifth: the interval holds no difference of a twentieth.
    old["round_medians_ms"] = list(np.linspace(1.8, 2.2, 8))
    new = {"p50_ms": 2.1, "round_medians_ms": list(np.linspace(1.9, 2.3, 8))}
    ratio = ratio_of_medians(old, new)
    assert ratio.low < 1 < ratio.high and ratio.value == pytest.approx(1.05)
    assert ratio.verdict(0.0) == ""


def test_without_rounds_the_extremes_are_the_interval() -> None:
    old = {"p50_ms": 2.0, "min_ms": 1.0, "p99_ms": 4.0}
    new = {"p50_ms": 6.0, "min_ms": 5.0, "p99_ms": 9.0}
    ratio = ratio_of_medians(old, new)
    assert (ratio.value, ratio.low, ratio.high) == (3.0, 1.25, 9.0)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.3, "slower"), (0.7, "faster"), (1.04, ""), (1.0, "")]
)
def test_only_what_is_beyond_noise_and_tolerance_is_called_slower(
    factor: float, verdict: str, pair: Callable[..., tuple[Path, Path]]
) -> None:
    found = compare(*pair(factor))
    rows = found.table.groups[0][1]
    assert [row[-1] for row in rows] == [verdict, "", "", ""]
    assert len(found.regressions) == (verdict == "slower")
    if found.regressions:
        assert found.regressions[0].startswith(
            "a.onnx on onnx:cpu, 1 threads, compute, batch 1: 1.30"
        )


def test_a_wide_tolerance_lets_a_slow_run_pass(pair: Callable[..., tuple[Path, Path]]) -> None:
    assert compare(*pair(1.3), 0.5).regressions == []


def test_other_machines_warn_and_are_not_judged(pair: Callable[..., tuple[Path, Path]]) -> None:
    old, new = pair(2.0, cpu="Intel Xeon")
    found = compare(old, new)
    assert found.warnings[0].startswith("different machines (cpu AMD EPYC and Intel Xeon)")
    assert (found.judged, found.regressions) == (False, [])
    assert "2.000" in found.table.groups[0][1][0][6]
    with pytest.raises(ConfigError, match=r"--fail-on-regression.*two results of one machine"):
        compare(old, new, strict=True)


def test_other_libraries_and_files_are_said(
    pair: Callable[..., tuple[Path, Path]], latency: dict[str, Any]
) -> None:
    latency["models"] = [{"name": "a.onnx", "sha256": "1"}]
    old, new = pair(1.0)
    newer = copy.deepcopy(latency)
    newer["software"]["packages"]["onnxruntime"] = "2.0"
    newer["models"][0]["sha256"] = "2"
    write_result(newer, new)
    warnings = compare(old, new).warnings
    assert "onnxruntime 1.32.0 before, 2.0 now" in warnings
    assert "a.onnx is another file now" in warnings


def test_the_command_prints_and_fails_when_asked(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = map(str, pair(1.3))
    assert main([new, "--compare", old]) == 0
    printed = capsys.readouterr().out
    assert "1.300" in printed and "regression: a.onnx on onnx:cpu" in printed
    assert exit_code([new, "--compare", old, "--fail-on-regression"]) == 1
    assert exit_code([old, "--compare", old, "--fail-on-regression"]) == 0
    assert "no regression beyond the noise" in capsys.readouterr().out
    assert main([new, "--compare", old, "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Worse beyond the noise" in page
    assert "**Regression:** a.onnx" in (tmp_path / "page" / "report.md").read_text()


def test_different_kinds_and_nothing_in_common_are_refused(
    latency: dict[str, Any], accuracy: dict[str, Any], tmp_path: Path
) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_result(latency, first)
    write_result(accuracy, second)
    with pytest.raises(ConfigError, match="found accuracy and latency"):
        compare(second, first)
    for row in latency["cases"]:
        row["model"] += "x"
    write_result(latency, second)
    with pytest.raises(ConfigError, match="the same model, backend, threads, stage, batch"):
        compare(first, second)


def accuracy_run(folder: Path, accuracy: dict[str, Any], classes: list[int], digest: str) -> Path:
    """A run of one model with these predictions; the labels are 0, 1, 0, 1, ..."""
    folder.mkdir()
    labels = np.arange(len(classes)) % 2
    share = float(np.mean(labels == classes))
    result = copy.deepcopy(accuracy)
    result["data"] |= {"images_sha256": digest, "images": len(classes)}
    result["rows"][0]["accuracy"] = share
    probabilities = np.eye(2, dtype=np.float32)[classes]
    names = [f"validation/{number}.png" for number in range(len(classes))]
    kept = keep(digest, names, labels, {"a.onnx on onnx:cpu": probabilities})
    write_predictions(folder / NAME, kept)
    write_result(result, folder / "accuracy.json")
    return folder / "accuracy.json"


def test_accuracies_are_compared_image_by_image(accuracy: dict[str, Any], tmp_path: Path) -> None:
    right = [number % 2 for number in range(400)]
    worse = [1 - label if number < 20 else label for number, label in enumerate(right)]
    old = accuracy_run(tmp_path / "old", accuracy, right, "x")
    new = accuracy_run(tmp_path / "new", accuracy, worse, "x")
    found = compare(old, new)
    ((row,),) = [rows for _, rows in found.table.groups]
    assert row[2:4] == ["100.00", "95.00"] and row[5:] == ["20", "worse"]
    # 20 lost, none gained, by hand: p = 1/402 and 21/402, -0.04975 +- 1.96 x 0.01140.
    assert row[4] == "-5.00 (-7.21 to -2.74)"
    assert found.regressions == ["a.onnx on onnx:cpu: -5.00 points of accuracy"]
    assert found.warnings == []


def test_without_predictions_or_with_other_images_it_is_said(
    accuracy: dict[str, Any], tmp_path: Path
) -> None:
    right = [number % 2 for number in range(40)]
    old = accuracy_run(tmp_path / "old", accuracy, right, "x")
    other = accuracy_run(tmp_path / "other", accuracy, right, "y")
    assert compare(old, other).warnings[0].startswith("other images")
    (tmp_path / "old" / NAME).unlink()
    same = accuracy_run(tmp_path / "same", accuracy, [1 - label for label in right], "x")
    found = compare(old, same)
    assert found.warnings == ["predictions of both runs are not here: the difference is not paired"]
    assert found.table.groups[0][1][0][-1] == "worse"
