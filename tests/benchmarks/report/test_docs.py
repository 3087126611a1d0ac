"""The tables of README.md and docs/: what the committed results give, and nothing typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import docs
from benchmarks.report.__main__ import main
from benchmarks.report.docs import documents, render, update_docs
from benchmarks.report.kinds import BLOCKS, LATENCY_SUMMARY, PEERS_SUMMARY
from benchmarks.report.result import write_result
from efficientface_deploy.errors import ArtifactError

BLOCK = "before\n<!-- latency: latency.json -->\nold figures\n<!-- end -->\nafter\n"
README = Path("README.md")


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_documents_say_what_their_results_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == render(text, path), "run python -m benchmarks.report --docs"


def test_the_figures_that_have_a_result_are_written_from_it() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in documents())
    for name in BLOCKS:
        assert f"<!-- {name}: benchmarks/results/" in text


def test_a_block_is_written_from_its_result(latency: dict[str, Any], tmp_path: Path) -> None:
    write_result(latency, tmp_path / "latency.json")
    text = render(BLOCK, README, tmp_path)
    assert text.startswith("before\n<!-- latency: latency.json -->\n\n| ")
    assert text.endswith("|\n\n<!-- end -->\nafter\n")
    assert "old figures" not in text
    assert "| a.onnx | onnx:cpu | fp32 | 1 | 1.00 (2.0x) | 1.20 | 2.00 | 1234 | 1.00 |" in text
    assert "| b[1].engine | trt | fp32 |  | 1.00 | 1.20 | 2.00 |  |  |" in text
    assert render(text, README, tmp_path) == text


def test_cold_start_and_roofline_are_columns_where_they_were_measured(
    full_latency: dict[str, Any],
) -> None:
    found = LATENCY_SUMMARY.fill(full_latency)
    assert list(found.columns)[-2:] == [">x roofline", ">Cold start"]
    rows = {row[0]: row for row in found.rows}
    assert list(rows["a.onnx"])[-2:] == ["2.00", "101"]


def test_accuracy_can_be_a_block_too(accuracy: dict[str, Any], tmp_path: Path) -> None:
    accuracy["rows"][0] |= {"accuracy_interval": [0.86, 0.89]}
    write_result(accuracy, tmp_path / "accuracy.json")
    text = render(BLOCK.replace("latency", "accuracy"), README, tmp_path)
    assert "| 87.65 (86.00 to 89.00) | 70.00 | 5.00 | 100.00 |" in text


def test_a_block_can_join_results(
    accuracy: dict[str, Any], latency: dict[str, Any], tmp_path: Path
) -> None:
    latency["cases"][0] |= {"model": "m-fp32-cpu.onnx", "backend": "onnx:cpu", "p50_ms": 1.5}
    accuracy["rows"][0] |= {"input_size": 224}
    write_result(latency, tmp_path / "latency.json")
    write_result(accuracy, tmp_path / "accuracy.json")
    found = {"accuracy": 0.8, "agreement": 0.9}
    names = ("m-int8-gpu.onnx", "m-fp16-cpu.onnx", "m-fp32-cpu.onnx")
    files = [{"file": name, "bytes": 2_000_000, "verification": found} for name in names]
    (tmp_path / "report.json").write_text(json.dumps({"artifacts": files}), encoding="utf-8")
    block = "<!-- models: accuracy.json report.json latency.json -->\n<!-- end -->\n"
    lines = render(block, README, tmp_path).splitlines()
    assert lines[5] == "| `m-fp32-cpu.onnx` | 224x224 | 80.00 | 90.00 | 2.00 | 1.50 (2.0x) |"
    assert lines[6:8] == [
        "| `m-int8-gpu.onnx` | 224x224 | 80.00 | 90.00 | 2.00 | needs a GPU |",
        "",
    ]
    all_three = "accuracy.json report.json latency.json"
    twice = render(block.replace(all_three, f"{all_three} {all_three}"), README, tmp_path)
    assert twice.splitlines()[4:10] == [*lines[4:7], *lines[4:7]]
    for other in ("accuracy.json latency.json", f"{all_three} accuracy.json"):
        with pytest.raises(ArtifactError, match="of kind accuracy and of export and of latency"):
            render(block.replace(all_three, other), README, tmp_path)


def test_a_part_of_a_result_can_be_a_block(full_latency: dict[str, Any], tmp_path: Path) -> None:
    write_result(full_latency, tmp_path / "latency.json")
    text = render(BLOCK.replace("latency:", "goals:"), README, tmp_path)
    assert "| x roofline at most | 1.5 | 1.4 | yes |" in text and "**Goals**" not in text
    text = render(BLOCK.replace("latency:", "profile:"), README, tmp_path)
    assert "| pointwise convolutions | 600 (12.0 M, 20.0) |" in text
    del full_latency["goals"]
    write_result(full_latency, tmp_path / "latency.json")
    with pytest.raises(ArtifactError, match="expected a result with goals, found none"):
        render(BLOCK.replace("latency:", "goals:"), README, tmp_path)


def test_peers_that_are_ranked_are_compared_by_work(make_case: Any) -> None:
    ratio = {"value": 1.5, "low": 1.25, "high": 2.0}
    ours = {"ranked": True, "is_ours": True, "ours_faster": {"value": 1.0, "low": 1.0, "high": 1.0}}
    other = {"backend": "ncnn", "ranked": True, "is_ours": False, "ours_faster": ratio}
    cases = [
        make_case("a", "compute", 1, backend="ours", **ours),
        make_case("a", "compute", 1, **other),
        make_case("a", "compute", 32, threads=2, **other),
        make_case("b", "compute", 1, **{**other, "ranked": False}),
    ]
    found = PEERS_SUMMARY.fill({"kind": "peers", "cases": cases})
    assert list(found.columns)[2:] == [">1 picture, 1 thread", ">32 pictures, 2 threads"]
    assert found.rows == [["a", "ncnn", *["1.50 (1.25 to 2.00)"] * 2]]


def test_other_text_is_left_alone(tmp_path: Path) -> None:
    text = "# Title\n\n<!-- a comment -->\n<!-- end -->\n"
    assert render(text, README, tmp_path) == text


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
        update_docs(tmp_path)
    assert path.read_text() == text


def test_the_command_writes_the_documents(
    latency: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_result(latency, tmp_path / "latency.json")
    (tmp_path / "docs").mkdir()
    paths = [tmp_path / "README.md", tmp_path / "docs" / "a.md"]
    for path in paths:
        path.write_text(BLOCK)
    (tmp_path / "docs" / "b.md").write_text("nothing measured")
    name = "benchmarks.report.__main__.update_docs"
    monkeypatch.setattr(name, lambda: docs.update_docs(tmp_path))
    assert main(["--docs"]) == 0
    assert main(["--docs"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["README.md rewritten", "a.md rewritten"]
    assert printed[2:] == ["README.md is up to date", "a.md is up to date"]
    assert not any("old figures" in path.read_text() for path in paths)
