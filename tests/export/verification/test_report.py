"""The report of a folder: rows of this export, and those of earlier ones that are still true."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from efficientface_deploy.spec import preset
from efficientface_export.verification.parity import Verification
from efficientface_export.verification.provenance import Provenance
from efficientface_export.verification.report import (
    Report,
    ReportRow,
    failed_name,
    report_header,
    reports_other_model,
)

SPEC = preset("rafdb").replace(input_size=64, name="test")
WEIGHTS = {"file": "student.safetensors", "sha256": "abc"}
HEADER = report_header(WEIGHTS, SPEC)
CREATED = "2026-01-01 00:00 UTC"
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


def write(
    folder: Path,
    rows: Sequence[ReportRow],
    header: Mapping[str, Any] = HEADER,
    into: Path | None = None,
) -> None:
    report = Report(folder, header)
    for row in rows:
        report.add(row)
    report.write(into or folder)


def add(folder: Path, name: str, verification: Verification = GOOD, **changes: object) -> ReportRow:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1_450_000)
    record = {"precision": "int8", "graph": "wide", "created": CREATED, "versions": {"onnx": "1"}}
    provenance = Provenance(record, path)
    row = ReportRow.of(path, folder, provenance, "68 int8 convolutions", verification, ["a note"])
    write(folder, [row], {**HEADER, **changes})
    return row


def files(folder: Path) -> list[str]:
    content = json.loads((folder / "report.json").read_text())
    assert content["schema"] == 2
    return [row["file"] for row in content["artifacts"]]


def test_json(tmp_path: Path) -> None:
    row = add(tmp_path, "a.onnx")
    content = json.loads((tmp_path / "report.json").read_text())
    assert {key: content[key] for key in HEADER} == HEADER
    (stored,) = content["artifacts"]
    assert stored["file"] == "a.onnx"
    assert stored["bytes"] == 1_450_000
    assert stored["sha256"] == hashlib.sha256(b"x" * 1_450_000).hexdigest()
    assert (stored["created"], stored["versions"]) == (CREATED, {"onnx": "1"})
    assert stored["verification"]["status"] == "verified"
    assert stored["verification"]["agreement"] == 0.9917
    assert ReportRow.from_dict(stored) == row


def test_markdown(tmp_path: Path) -> None:
    add(tmp_path, "a.onnx")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Export of student.safetensors\n\nefficientface, test, 7 classes")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0].count("|") == table[2].count("|") == table[1].count("|") == 14
    assert table[2] == (
        "| a.onnx | 1.45 | wide | 68 int8 convolutions | 120 | 0.012 | 0.9917 [0.9544, 0.9985] "
        "| 0.00021 | 0.8361 | -0.0083 [-0.0323, +0.0159] | 0.6250 | verified "
        "| 2026-01-01 00:00 UTC |"
    )
    assert "Images: faces, test, 120 images." in text
    assert "- a.onnx: a note" in text


def test_markdown_of_what_failed_or_was_not_run(tmp_path: Path) -> None:
    add(tmp_path, "b.onnx", Verification("onnx:cpu", 3, "s", problems=("KL 1 > 0", "NaN")))
    add(tmp_path, "c.engine", Verification(not_run="no GPU"))
    rows = (tmp_path / "report.md").read_text().splitlines()
    assert any("| FAILED (KL 1 > 0; NaN) |" in line for line in rows)
    assert any(
        "|  |  |  |  |  |  |  | built, not verified here (no GPU) |" in line for line in rows
    )


def test_rows_are_merged_and_vanished_files_dropped(tmp_path: Path) -> None:
    add(tmp_path, "a.onnx")
    add(tmp_path, "b.onnx")
    assert files(tmp_path) == ["a.onnx", "b.onnx"]
    again = Verification("onnx:cpu", 500, "other", 0.5)
    add(tmp_path, "a.onnx", again)
    assert files(tmp_path) == ["a.onnx", "b.onnx"]
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["artifacts"][0]["verification"]["images"] == 500
    (tmp_path / "a.onnx").unlink()
    add(tmp_path, "c.onnx")
    assert files(tmp_path) == ["b.onnx", "c.onnx"]


def test_row_of_a_file_that_was_replaced_is_dropped(tmp_path: Path) -> None:
    """Of the same size, even: its figures are another file's."""
    add(tmp_path, "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"y" * 1_450_000)
    add(tmp_path, "b.onnx")
    assert files(tmp_path) == ["b.onnx"]


def test_success_takes_the_place_of_failure(tmp_path: Path) -> None:
    """The failed file is there until the new one is published."""
    add(tmp_path, "a.failed.rtx.engine")
    add(tmp_path, "a.rtx.engine")
    assert files(tmp_path) == ["a.rtx.engine"]


def test_what_more_images_showed_of_the_same_file_stays(tmp_path: Path) -> None:
    few = dataclasses.replace(GOOD, images=16, accuracy=None, macro_f1=None)
    rows = [add(tmp_path, "a.onnx"), add(tmp_path, "b.onnx"), add(tmp_path, "c.onnx")]
    write(tmp_path, rows)
    again = [
        dataclasses.replace(rows[0], verification=few),
        dataclasses.replace(rows[1], verification=few, sha256="b" * 64),  # another file
        dataclasses.replace(rows[2], verification=dataclasses.replace(few, problems=("KL 9",))),
    ]
    write(tmp_path, again)
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["verification"]["images"] for row in content["artifacts"]] == [120, 16, 16]


def test_failure_does_not_hide_an_earlier_success(tmp_path: Path) -> None:
    add(tmp_path, "a.onnx")
    add(tmp_path, "a.failed.onnx")
    assert files(tmp_path) == ["a.failed.onnx", "a.onnx"]


def test_written_elsewhere_first(tmp_path: Path) -> None:
    """What is not published yet is listed; the folder itself is not touched."""
    add(tmp_path, "a.onnx")
    before = (tmp_path / "report.json").read_bytes()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    row = add(scratch, "b.onnx")
    write(tmp_path, [row], into=scratch)
    assert files(scratch) == ["a.onnx", "b.onnx"]
    assert (tmp_path / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    "other",
    [
        report_header({**WEIGHTS, "sha256": "def"}, SPEC),
        report_header(WEIGHTS, SPEC.replace(input_size=96)),
        report_header(WEIGHTS, preset("affectnet7").replace(input_size=64, name="test")),
    ],
)
def test_another_model_begins_anew(tmp_path: Path, other: dict[str, object]) -> None:
    add(tmp_path, "a.onnx")
    assert not reports_other_model(tmp_path, HEADER)
    assert reports_other_model(tmp_path, other)
    add(tmp_path, "b.onnx", **other)
    assert files(tmp_path) == ["b.onnx"]


def test_no_report_is_of_no_other_model(tmp_path: Path) -> None:
    assert not reports_other_model(tmp_path, HEADER)
    (tmp_path / "report.json").write_text("[]")
    assert not reports_other_model(tmp_path, HEADER)


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
        json.dumps({**HEADER, "schema": 1, "artifacts": []}).encode(),
        json.dumps({**HEADER, "schema": 2, "artifacts": 3}).encode(),
        json.dumps({**HEADER, "schema": 2, "artifacts": [3]}).encode(),
        json.dumps({**HEADER, "schema": 2, "artifacts": [{}]}).encode(),
        json.dumps({**HEADER, "schema": 2, "artifacts": [{"file": "a.onnx"}]}).encode(),
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
        {"largest_fp32_value": "large"},
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


def described(folder: Path, verification: Verification, **changes: object) -> list[str]:
    row = add(folder, "a.onnx", verification)
    return dataclasses.replace(row, **changes).describe().splitlines()


def test_lines_for_the_terminal(tmp_path: Path) -> None:
    """One for the file, one for each check, one for each note."""
    assert described(tmp_path, GOOD, largest_fp32_value=1234.5) == [
        "[ok] a.onnx: 1.45 MB, verified on faces, test, 120 images by onnx:cpu",
        "  [ok] precision: 68 int8 convolutions; wide graph",
        "  [ok] FP16 range: largest value 1234 of 65504",
        "  [ok] parity: largest difference 0.012, KL 0.00021 (at most 0.75 and 0.05)",
        "  [ok] agreement: 0.9917 [0.9544, 0.9985] (at least 0.98)",
        "  [ok] accuracy: 0.8361, minus the reference's -0.0083 [-0.0323, +0.0159], "
        "macro-F1 0.6250",
        "       a note",
    ]


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("difference 0.012 > 0", "parity: largest difference 0.012"),
        ("KL 0.00021 > 0", "parity: largest difference 0.012"),
        ("agreement 0.9917 < 1", "agreement: 0.9917"),
        ("accuracy 0.8361 < 0.9", "accuracy: 0.8361"),
    ],
)
def test_line_of_what_failed(tmp_path: Path, problem: str, line: str) -> None:
    lines = described(tmp_path, dataclasses.replace(GOOD, problems=(problem,)))
    assert lines[0].startswith("[FAILED] a.onnx: 1.45 MB, FAILED on faces, test, 120 images")
    (failed,) = [text for text in lines[1:] if "FAILED" in text]
    assert failed.startswith(f"  [FAILED] {line}")


def test_lines_of_what_could_not_be_judged(tmp_path: Path) -> None:
    question = ("agreement 0.9917 of 0.98 on 16 images, needs at least 50",)
    few = dataclasses.replace(
        GOOD, images=16, accuracy=None, macro_f1=None, undecided=question, probe="its logits"
    )
    lines = described(tmp_path, few, arithmetic="")
    assert "  [--] precision: not counted, for want of the onnx package" in lines
    assert "  [ok] probe: its logits" in lines
    (agreement,) = [line for line in lines if "agreement" in line]
    assert agreement.startswith("  [??] agreement: 0.9917 [")
    assert agreement.endswith("not decided by 16 images; needs at least 50")
    assert "  [--] accuracy: not measured, which --val would do" in lines


def test_lines_without_figures(tmp_path: Path) -> None:
    lines = described(tmp_path, Verification(not_run="no GPU"))
    assert lines[0] == "[--] a.onnx: 1.45 MB, built, not verified here"
    assert lines[2] == "  [--] outputs: no GPU"
    nan = Verification("onnx:cpu", 3, "s", problems=("NaN instead of finite outputs",))
    lines = described(tmp_path, nan)
    assert lines[0] == "[FAILED] a.onnx: 1.45 MB, FAILED on s by onnx:cpu"
    assert lines[2] == "  [FAILED] outputs: NaN instead of finite outputs"


def test_failed_name() -> None:
    assert failed_name("efficientface-int8-gpu.rtx.engine") == (
        "efficientface-int8-gpu.failed.rtx.engine"
    )


CANDIDATE = {
    **{"precision": "fp32", "graph": "deploy", "backend": "onnx:cpu", "threads": 2},
    **{"p50_ms": 1.234, "p50_interval_ms": [1.2, 1.3], "times": 1.0, "times_interval": [1.0, 1.0]},
    **{"kernels": None, "bytes_moved": None, "agreement": 1.0, "accuracy": None},
    "verdict": "chosen",
}
TUNING: dict[str, Any] = {
    **{"objective": "latency", "batch": 1, "machine": "Test CPU", "reason": "it is the fastest"},
    **{"candidates": [CANDIDATE], "notes": ["a note of the tuning"]},
}


def test_tuning(tmp_path: Path) -> None:
    row = dataclasses.replace(add(tmp_path, "a.onnx"), tuning=TUNING)
    write(tmp_path, [row])
    assert ReportRow.from_dict(row.as_dict()) == row
    add(tmp_path, "b.onnx")  # a later export keeps it
    text = (tmp_path / "report.md").read_text()
    _, section = text.split("## a.onnx, tuned for latency\n")
    assert "it is the fastest. Images a call: 1. Measured on: Test CPU." in section
    assert "| 2 | 1.23 [1.2, 1.3] | 1.00 [1.00, 1.00] | 1.0000 | chosen |" in section
    assert "- a note of the tuning" in section
    assert "kernels" not in section  # a column of which nothing is known


def test_tuning_by_an_estimate(tmp_path: Path) -> None:
    counts = {**CANDIDATE, **dict.fromkeys(("p50_ms", "times", "threads"))}
    counts |= {"kernels": 79, "bytes_moved": 7_800_000}
    row = dataclasses.replace(add(tmp_path, "a.engine"), tuning={**TUNING, "candidates": [counts]})
    write(tmp_path, [row])
    assert "| deploy | onnx:cpu | 79 | 7.8 | 1.0000 |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "tuning",
    [
        *(7, [], {}, {**TUNING, "candidates": 3}, {**TUNING, "candidates": [{}]}),
        {**TUNING, "candidates": [{**CANDIDATE, "p50_ms": "fast"}]},
        {**TUNING, "notes": 7},
    ],
)
def test_damaged_tuning(tmp_path: Path, tuning: Any) -> None:
    row = add(tmp_path, "a.onnx")
    with pytest.raises((TypeError, KeyError, ValueError)):
        ReportRow.from_dict({**row.as_dict(), "tuning": tuning})
