"""The report of a folder: rows of this export, and those of earlier ones that are still true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from efficientface_export.report import Row, write_report
from efficientface_export.verify import Verification

HEADER = {
    "weights": "student.safetensors",
    "weights_sha256": "abc",
    "model": "efficientface, test, 7 classes, 64x64",
    "versions": {"onnx": "1"},
    "created": "2026-01-01 00:00 UTC",
}
GOOD = Verification(
    runner="onnx:cpu",
    images=120,
    source="faces, test, 120 images",
    max_difference=0.0123,
    agreement=0.9917,
    agreement_interval=(0.9544, 0.9985),
    kl=0.00021,
    accuracy=0.8361,
    accuracy_difference=-0.0083,
    accuracy_interval=(-0.0323, 0.0159),
    macro_f1=0.625,
)


def add(folder: Path, name: str, verification: Verification = GOOD, **changes: object) -> Row:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1_450_000)
    row = Row.of(path, folder, "int8", "68 int8 convolutions", verification, ["a note"])
    write_report(folder, [row], {**HEADER, **changes})
    return row


def files(folder: Path) -> list[str]:
    content = json.loads((folder / "report.json").read_text())
    assert content["schema"] == 1
    return [row["file"] for row in content["artifacts"]]


def test_json(tmp_path: Path) -> None:
    row = add(tmp_path, "a.onnx")
    content = json.loads((tmp_path / "report.json").read_text())
    assert {key: content[key] for key in HEADER} == HEADER
    (stored,) = content["artifacts"]
    assert stored["file"] == "a.onnx"
    assert stored["bytes"] == 1_450_000
    assert stored["verification"]["status"] == "verified"
    assert stored["verification"]["agreement"] == 0.9917
    assert Row.from_dict(stored) == row


def test_markdown(tmp_path: Path) -> None:
    add(tmp_path, "a.onnx")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Export of student.safetensors\n\nefficientface, test, 7 classes")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0].count("|") == table[2].count("|") == table[1].count("|") == 12
    assert table[2] == (
        "| a.onnx | 1.45 | 68 int8 convolutions | 120 | 0.012 | 0.9917 [0.9544, 0.9985] | 0.00021 "
        "| 0.8361 | -0.0083 [-0.0323, +0.0159] | 0.6250 | verified |"
    )
    assert "Images: faces, test, 120 images." in text
    assert "- a.onnx: a note" in text


def test_markdown_of_what_failed_or_was_not_run(tmp_path: Path) -> None:
    add(tmp_path, "b.onnx", Verification("onnx:cpu", 3, "s", problems=("KL 1 > 0", "NaN")))
    add(tmp_path, "c.engine", Verification(not_run="no GPU"))
    rows = (tmp_path / "report.md").read_text().splitlines()
    assert any(line.endswith("| FAILED (KL 1 > 0; NaN) |") for line in rows)
    assert any(
        line.endswith("|  |  |  |  |  |  |  | built, not verified here (no GPU) |") for line in rows
    )


def test_rows_are_merged_and_vanished_files_dropped(tmp_path: Path) -> None:
    add(tmp_path, "a.onnx")
    add(tmp_path, "b.onnx")
    assert files(tmp_path) == ["a.onnx", "b.onnx"]
    again = Verification("onnx:cpu", 5, "other", 0.5)
    add(tmp_path, "a.onnx", again)
    assert files(tmp_path) == ["a.onnx", "b.onnx"]
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["artifacts"][0]["verification"]["images"] == 5
    (tmp_path / "a.onnx").unlink()
    add(tmp_path, "c.onnx")
    assert files(tmp_path) == ["b.onnx", "c.onnx"]


def test_other_weights_begin_anew(tmp_path: Path) -> None:
    add(tmp_path, "a.onnx")
    add(tmp_path, "b.onnx", weights_sha256="def")
    assert files(tmp_path) == ["b.onnx"]


def test_a_file_elsewhere_is_named_by_its_way_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    add(out, "../models/a.onnx")
    assert files(out) == ["../models/a.onnx"]
    assert "| ../models/a.onnx |" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"schema": 1}',
        b'{"schema": 2, "weights_sha256": "abc", "artifacts": []}',
        b'{"schema": 1, "weights_sha256": "abc", "artifacts": 3}',
        b'{"schema": 1, "weights_sha256": "abc", "artifacts": [3]}',
        b'{"schema": 1, "weights_sha256": "abc", "artifacts": [{}]}',
        b'{"schema": 1, "weights_sha256": "abc", "artifacts": [{"file": "a.onnx"}]}',
        b"[" * 100_000,
    ],
)
def test_damaged_report(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "report.json").write_bytes(damaged)
    add(tmp_path, "b.onnx")
    assert files(tmp_path) == ["b.onnx"]


@pytest.mark.parametrize(
    "change",
    [
        {"file": 3},
        {"bytes": "many"},
        {"verification": None},
        {"verification": {}},
        {"notes": None},
        {"surprise": 1},
    ],
)
def test_damaged_row(tmp_path: Path, change: dict[str, object]) -> None:
    add(tmp_path, "a.onnx")
    content = json.loads((tmp_path / "report.json").read_text())
    content["artifacts"][0].update(change)
    (tmp_path / "report.json").write_text(json.dumps(content))
    add(tmp_path, "b.onnx")
    assert files(tmp_path) == ["b.onnx"]


def test_damaged_figure(tmp_path: Path) -> None:
    add(tmp_path, "a.onnx")
    content = json.loads((tmp_path / "report.json").read_text())
    content["artifacts"][0]["verification"]["kl"] = "none"
    (tmp_path / "report.json").write_text(json.dumps(content))
    add(tmp_path, "b.onnx")
    assert files(tmp_path) == ["b.onnx"]


def test_line_for_the_terminal(tmp_path: Path) -> None:
    line, note = add(tmp_path, "a.onnx").describe().splitlines()
    assert line == (
        "[ok] a.onnx: 1.45 MB; 68 int8 convolutions; verified on faces, test, 120 images by "
        "onnx:cpu: largest difference 0.012, agreement 0.9917 [0.9544, 0.9985], KL 0.00021, "
        "accuracy 0.8361, accuracy minus reference -0.0083 [-0.0323, +0.0159], macro-F1 0.6250"
    )
    assert note == "     a note"
    failed = Verification("onnx:cpu", 3, "s", 0.9, problems=("KL 1 > 0",))
    assert add(tmp_path, "b.onnx", failed).describe().startswith("[FAILED] b.onnx: ")
    assert "largest difference 0.9 (KL 1 > 0)" in add(tmp_path, "b.onnx", failed).describe()
    unrun = add(tmp_path, "c.engine", Verification(not_run="no GPU")).describe()
    assert unrun.startswith("[--] c.engine: ")
    assert "built, not verified here (no GPU)" in unrun
