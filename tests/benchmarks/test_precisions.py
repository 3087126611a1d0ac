"""What is timed when no model is named."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import precisions
from benchmarks.measure import models
from benchmarks.precisions import NAMES, NOTE, default_models
from efficientface_deploy.predictor import BUNDLED_ONNX, BUNDLED_WEIGHTS


@pytest.fixture(autouse=True)
def no_artifacts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "ARTIFACTS", tmp_path / "artifacts")


def test_what_lies_under_artifacts_is_taken_and_nothing_is_exported(
    make_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_onnx("artifacts/a.onnx")
    monkeypatch.setattr(precisions, "export", None)
    with default_models() as (paths, absent, notes):
        assert (paths, absent, notes) == ([BUNDLED_WEIGHTS, BUNDLED_ONNX, found], [], [])


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions.importlib.util, "find_spec", lambda name: None)
    with default_models() as (paths, absent, notes):
        assert paths == [BUNDLED_WEIGHTS, BUNDLED_ONNX] and notes == []
    assert [entry.model for entry in absent] == list(NAMES)
    assert "efficientface-deploy[export]" in absent[0].reason


def test_two_commands_make_the_files_which_are_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **keywords: Any) -> Any:
        commands.append(command[1:])
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        for name in NAMES:
            (out / name).write_bytes(b"model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(precisions.subprocess, "run", run)
    with default_models() as (paths, absent, notes):
        assert [path.name for path in paths[2:]] == list(NAMES)
        assert all(path.is_file() for path in paths)
        assert (absent, notes) == ([], [NOTE])
    assert not paths[-1].exists()
    assert [command[1] for command in commands] == ["training.prepare", "efficientface_export.cli"]
    assert "--no-int8-search" in commands[1]
    assert commands[1][commands[1].index("--weights") + 1] == str(BUNDLED_WEIGHTS)


def test_an_export_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **keywords: Any) -> Any:
        return subprocess.CompletedProcess(command, 2, "", "working\nerror: disk full\n")

    monkeypatch.setattr(precisions.subprocess, "run", run)
    with default_models() as (paths, absent, notes):
        assert paths == [BUNDLED_WEIGHTS, BUNDLED_ONNX]
    assert {entry.reason for entry in absent} == {"export: error: disk full"}
    assert notes == []


@pytest.mark.slow
def test_the_real_export_makes_both_files(tmp_path: Path) -> None:
    paths, absent = precisions.export(tmp_path)
    assert absent == []
    assert [path.name for path in paths] == list(NAMES)
    assert all(path.stat().st_size > 1e6 for path in paths)
