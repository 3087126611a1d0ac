"""README's tables: what the committed results give, and nothing typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.__main__ import main
from benchmarks.report.readme import README, latency_summary, render_readme, update_readme
from benchmarks.report.result import write_result
from efficientface_deploy.errors import ArtifactError

BLOCK = "before\n<!-- latency: latency.json -->\nold figures\n<!-- end -->\nafter\n"


def test_readme_says_what_its_results_say() -> None:
    text = README.read_text(encoding="utf-8")
    assert "<!-- latency: " in text and "<!-- export: " in text
    written = render_readme(text)
    assert text == written, "run python benchmarks/report/__main__.py --readme"


def test_a_block_is_written_from_its_result(latency: dict[str, Any], tmp_path: Path) -> None:
    write_result(latency, tmp_path / "latency.json")
    text = render_readme(BLOCK, tmp_path)
    assert text.startswith("before\n<!-- latency: latency.json -->\n\n| ")
    assert text.endswith("|\n\n<!-- end -->\nafter\n")
    assert "old figures" not in text
    assert "| ONNX FP32 | 1 | 1.00 (2.0x) | 1.20 | 2.00 | 1234 | 1.00 |" in text
    assert "| TensorRT FP32 | - | 1.00 | 1.20 | 2.00 |  |  |" in text
    assert render_readme(text, tmp_path) == text


def test_cold_start_and_floor_are_columns_where_they_were_measured(
    full_latency: dict[str, Any],
) -> None:
    found = latency_summary(full_latency)
    assert list(found.columns)[-2:] == [">x floor", ">cold start"]
    rows = {row[0]: row for row in found.groups[0][1]}
    assert list(rows["ONNX FP32"])[-2:] == ["2.00", "101"]


def test_accuracy_can_be_a_block_too(accuracy: dict[str, Any], tmp_path: Path) -> None:
    accuracy["rows"][0] |= {"accuracy_interval": [0.86, 0.89]}
    write_result(accuracy, tmp_path / "accuracy.json")
    text = render_readme(BLOCK.replace("latency", "accuracy"), tmp_path)
    assert "| 87.65 % [86.00, 89.00] | 70.00 % | 5.00 % | 100.00 % |" in text


def test_other_text_is_left_alone(tmp_path: Path) -> None:
    text = "# Title\n\n<!-- a comment -->\n<!-- end -->\n"
    assert render_readme(text, tmp_path) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BLOCK.replace("<!-- end -->\n", ""), "a block without its end"),
        (BLOCK + BLOCK.replace("<!-- end -->\n", ""), "a block without its end"),
        (BLOCK.replace("latency.json", "gone.json"), "no such file"),
        (BLOCK.replace("latency:", "accuracy:"), "expected a result of kind accuracy"),
        (BLOCK.replace("latency:", "speed:"), "expected a result of kind speed"),
    ],
)
def test_a_block_that_cannot_be_written_is_one_line(
    text: str, message: str, latency: dict[str, Any], tmp_path: Path
) -> None:
    write_result(latency, tmp_path / "latency.json")
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=message):
        update_readme(path, tmp_path)
    assert path.read_text() == text


def test_the_command_writes_readme(
    latency: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_result(latency, tmp_path / "latency.json")
    path = tmp_path / "README.md"
    path.write_text(BLOCK)
    monkeypatch.setattr(
        "benchmarks.report.__main__.update_readme", lambda: update_readme(path, tmp_path)
    )
    assert main(["--readme"]) == 0
    assert main(["--readme"]) == 0
    printed = capsys.readouterr().out
    assert printed == "README.md rewritten\nREADME.md is up to date\n"
    assert "old figures" not in path.read_text()
