"""Result files: round trip, older and newer schemas, and files that are none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.report.result import (
    SCHEMA_VERSION,
    digits,
    headline,
    read_result,
    rows_of,
    short_names,
    write_result,
)
from efficientface_deploy.errors import ArtifactError


def stored(result: Any, folder: Path) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(result))
    return path


def test_a_result_comes_back_as_it_was(full_latency: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    write_result(full_latency, path)
    assert read_result(path) == full_latency
    assert "something new" in read_result(path)


def test_every_committed_result_can_be_read() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert paths
    for path in paths:
        result = read_result(path)
        assert rows_of(result) or result["goals"]
        assert headline(result) or result["kind"] == "export"


def test_a_newer_schema_is_named(latency: dict[str, Any], tmp_path: Path) -> None:
    latency["schema"] = SCHEMA_VERSION + 1
    with pytest.raises(ArtifactError, match=f"schema {SCHEMA_VERSION + 1}, which a newer version"):
        read_result(stored(latency, tmp_path))


def test_a_truncated_file_is_named(latency: dict[str, Any], tmp_path: Path) -> None:
    path = stored(latency, tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArtifactError, match="no JSON, or a truncated file"):
        read_result(path)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"schema": 2}', '{"schema": true, "kind": "x"}'])
def test_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="expected a result of benchmarks/"):
        read_result(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ArtifactError, match="truncated"):
        read_result(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("p50_ms", None),
        ("p50_ms", "fast"),
        ("p50_ms", float("nan")),
        ("p50_ms", -1.0),
        ("p50_ms", True),
        ("batch", [1]),
        ("model", 3),
    ],
)
def test_a_row_that_cannot_be_shown_is_named(
    key: str, value: object, latency: dict[str, Any], tmp_path: Path
) -> None:
    latency["cases"][1][key] = value
    with pytest.raises(ArtifactError, match=f"a row whose {key} is"):
        read_result(stored(latency, tmp_path))


def test_a_row_without_a_figure_is_named(latency: dict[str, Any], tmp_path: Path) -> None:
    del latency["cases"][0]["p99_ms"]
    with pytest.raises(ArtifactError, match="a row whose p99_ms is None"):
        read_result(stored(latency, tmp_path))


def test_an_unknown_kind_may_have_its_own_form(latency: dict[str, Any], tmp_path: Path) -> None:
    other = {**latency, "kind": "runtime", "start": {"ours": {"ms": 3.5}}}
    assert rows_of(read_result(stored(other, tmp_path))) == []
    del other["machine"]
    with pytest.raises(ArtifactError, match="kind 'runtime' without a machine"):
        read_result(stored(other, tmp_path))
    del latency["cases"]
    with pytest.raises(ArtifactError, match="kind 'latency' without cases"):
        read_result(stored(latency, tmp_path))


def test_an_older_result_gets_empty_lists(latency: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy(latency)
    del before["absent"], before["warnings"]
    result = read_result(stored(before, tmp_path))
    assert (result["absent"], result["warnings"]) == ([], [])
    with pytest.raises(ArtifactError, match="warnings that is no list"):
        read_result(stored({**latency, "warnings": "none"}, tmp_path))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (116.4, "116"),
        (999.7, "1000"),
        (1234.5, "1234"),
    ],
)
def test_digits(value: float | None, text: str) -> None:
    assert digits(value) == text


def test_short_names_drop_what_all_share() -> None:
    names = ["efficientface-a.onnx", "efficientface-b.onnx"]
    assert list(short_names(names).values()) == ["a.onnx", "b.onnx"]
    assert short_names(["efficientface-a.onnx", "x.onnx"])["x.onnx"] == "x.onnx"
    assert short_names(["efficientface-a.onnx"]) == {"efficientface-a.onnx": "efficientface-a.onnx"}
