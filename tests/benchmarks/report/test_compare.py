"""Two runs compared: what is noise, what is not, and what may not be compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.report.__main__ import main
from benchmarks.report.compare import (
    PREDICTIONS,
    compare,
    ratio_of_medians,
    read_predictions,
    verdict_on,
    write_predictions,
)
from benchmarks.report.result import write_result
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ArtifactError, ConfigError

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
    assert ratio == {"value": 1.5, "low": 1.5, "high": 1.5}
    # Rounds that vary by a fifth: the interval holds no difference of a twentieth.
    old["round_medians_ms"] = list(np.linspace(1.8, 2.2, 8))
    new = {"p50_ms": 2.1, "round_medians_ms": list(np.linspace(1.9, 2.3, 8))}
    ratio = ratio_of_medians(old, new)
    assert ratio["low"] < 1 < ratio["high"] and ratio["value"] == pytest.approx(1.05)
    assert verdict_on(ratio, 0.0) == ""


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.3, "slower"), (0.7, "faster"), (1.04, ""), (1.0, "")]
)
def test_only_what_is_beyond_noise_and_tolerance_is_called_slower(
    factor: float, verdict: str, pair: Callable[..., tuple[Path, Path]]
) -> None:
    found = compare(*pair(factor))
    verdicts = [row[-1] for row in found.table.rows]
    if verdict:  # a column that says nothing is left out
        assert verdicts == [verdict, "", "", ""]
    else:
        assert "Verdict" not in found.table.columns
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
    assert "2.000" in str(found.table.rows[0][6])
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
    assert main([new, "--compare", old, "--out", str(tmp_path / "report")]) == 0
    assert "**Regression:** a.onnx" in (tmp_path / "report" / "report.md").read_text()


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
    own = {"a.onnx on onnx:cpu": probabilities}
    write_predictions(folder / PREDICTIONS, digest, names, labels, own)
    write_result(result, folder / "accuracy.json")
    return folder / "accuracy.json"


def test_accuracies_are_compared_image_by_image(accuracy: dict[str, Any], tmp_path: Path) -> None:
    right = [number % 2 for number in range(400)]
    worse = [1 - label if number < 20 else label for number, label in enumerate(right)]
    old = accuracy_run(tmp_path / "old", accuracy, right, "x")
    new = accuracy_run(tmp_path / "new", accuracy, worse, "x")
    found = compare(old, new)
    (row,) = found.table.rows
    assert row[2:4] == ["100.00", "95.00"] and row[5:] == ["20", "worse"]
    # 20 lost, none gained, by hand: p = 1/402 and 21/402, -0.04975 +- 1.96 x 0.01140.
    assert row[4] == "-5.00 (-7.21 to -2.74)"
    assert found.regressions == ["a.onnx on onnx:cpu: -5.00 points of accuracy"]
    assert found.warnings == []


def test_without_predictions_or_with_other_images_nothing_is_judged(
    accuracy: dict[str, Any], tmp_path: Path
) -> None:
    right = [number % 2 for number in range(40)]
    old = accuracy_run(tmp_path / "old", accuracy, right, "x")
    other = accuracy_run(tmp_path / "other", accuracy, right, "y")
    assert compare(old, other).warnings[0].startswith("other images")
    (tmp_path / "old" / PREDICTIONS).unlink()
    same = accuracy_run(tmp_path / "same", accuracy, [1 - label for label in right], "x")
    found = compare(old, same)
    assert found.warnings == [
        "predictions of both runs are not here: the accuracies are not judged"
    ]
    assert found.table.rows == [["a.onnx", "onnx:cpu", "100.00", "0.00"]]
    assert (found.judged, found.regressions) == (False, [])
    with pytest.raises(ConfigError, match=r"--fail-on-regression.*of the same images beside both"):
        compare(old, same, strict=True)
    # Predictions that lie beside a result but are of other images are not taken.
    write_predictions(tmp_path / "old" / PREDICTIONS, "z", ["a.png"], np.array([0]), {})
    assert compare(old, same).warnings == found.warnings


def test_a_model_that_one_run_alone_predicted_has_no_verdict(
    accuracy: dict[str, Any], tmp_path: Path
) -> None:
    right = [number % 2 for number in range(40)]
    old = accuracy_run(tmp_path / "old", accuracy, right, "x")
    new = accuracy_run(tmp_path / "new", accuracy, [1 - label for label in right], "x")
    write_predictions(tmp_path / "old" / PREDICTIONS, "x", ["a.png"] * 40, np.zeros(40, int), {})
    found = compare(old, new)
    assert found.table.rows == [["a.onnx", "onnx:cpu", "100.00", "0.00"]]
    assert found.regressions == []


@pytest.mark.parametrize("damage", [{"cases": None}, {"cases": [3]}, {"machine": {"gpus": 3}}])
def test_a_damaged_result_is_one_line(
    damage: dict[str, Any], pair: Callable[..., tuple[Path, Path]], latency: dict[str, Any]
) -> None:
    old, new = pair(1.0)
    write_result({**latency, **damage}, old)
    with pytest.raises(ArtifactError, match=r"old\.json, .*new\.json: expected a result of bench"):
        compare(old, new)


IMAGES = ["a/1.png", "a/2.png", "b/ü.png"]
LABELS = np.array([0, 1, 1])
# The first two differ by less than float16 can tell.
PROBABILITIES = np.array([[0.50001, 0.49999], [0.2, 0.8], [0.9, 0.1]], dtype=np.float32)


def test_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / PREDICTIONS
    write_predictions(path, "hash", IMAGES, LABELS, {"a.onnx on onnx:cpu": PROBABILITIES})
    found = read_predictions(path)
    assert (found["images_sha256"], found["images"].tolist()) == ("hash", IMAGES)
    assert found["labels"].tolist() == [0, 1, 1]
    assert found["classes: a.onnx on onnx:cpu"].tolist() == [0, 1, 0]
    kept = found["probabilities: a.onnx on onnx:cpu"]
    assert kept.dtype == np.float16
    np.testing.assert_allclose(kept, PROBABILITIES, atol=1e-3)
    assert [child.name for child in tmp_path.iterdir()] == [PREDICTIONS]


def test_the_class_survives_rounding(tmp_path: Path) -> None:
    close = np.array([[0.49999, 0.50001]], dtype=np.float32)
    write_predictions(tmp_path / PREDICTIONS, "hash", ["x"], np.array([1]), {"a": close})
    kept = read_predictions(tmp_path / PREDICTIONS)
    assert kept["probabilities: a"].argmax(axis=1).tolist() == [0]
    assert kept["classes: a"].tolist() == [1]


@pytest.mark.parametrize("damage", ["nonsense", "truncated", "pickled", "short", "empty"])
def test_a_damaged_file_is_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / PREDICTIONS
    write_predictions(path, "hash", IMAGES, LABELS, {"a": PROBABILITIES})
    if damage == "nonsense":
        path.write_bytes(b"not an archive")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "pickled":
        np.savez(path, images_sha256=np.array([{"x": 1}], dtype=object))
    elif damage == "short":
        write_predictions(path, "hash", IMAGES[:2], LABELS, {"a": PROBABILITIES})
    else:
        path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"expected predictions of benchmarks/accuracy\.py"):
        read_predictions(path)
