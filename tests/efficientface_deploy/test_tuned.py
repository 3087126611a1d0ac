"""A tuned file runs as it was tuned on its own CPU, and by the defaults anywhere else."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from efficientface_deploy import load, tuned
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.tuned import Tuned, read_tuned
from efficientface_export.graph.io import read_onnx, write_onnx

RECORD = {"objective": "latency", "backend": "onnx:cpu", "threads": 2, "machine": "Test CPU"}


@pytest.fixture
def make(model_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file tuned on the CPU here, which is called ``Test CPU`` and has four cores."""
    monkeypatch.setattr(tuned, "cpu_model", lambda: "Test CPU")
    monkeypatch.setattr(tuned, "usable_cpus", lambda: 4)

    def make(**changes: Any) -> Path:
        file = read_onnx(model_files["onnx"])
        path = tmp_path / "tuned.onnx"
        record = {"precision": "fp32", "tuned": {**RECORD, "p50_ms": 1.2, **changes}}
        write_onnx(file.graph, path, file.spec, record, file.probe)
        return path

    return make


def options(path: Path, **arguments: Any) -> tuple[str, int | None]:
    with load(path, **arguments) as predictor:
        return predictor.backend, predictor._backend.options.threads


@pytest.mark.parametrize(
    ("changes", "arguments", "threads"),
    [
        ({}, {}, 2),
        ({"threads": 3}, {}, 3),
        ({"threads": 64}, {}, 4),  # the same CPU, of which this process has less
        ({"threads": None}, {}, None),
        ({}, {"threads": 1}, 1),  # told otherwise
        ({}, {"backend": "onnx"}, None),
        ({}, {"backend": "onnx:cpu", "threads": 3}, 3),
    ],
)
def test_it_is_followed_unless_told_otherwise(
    make: Any, changes: dict[str, Any], arguments: dict[str, Any], threads: int | None
) -> None:
    assert options(make(**changes), **arguments) == ("onnx:cpu", threads)


def test_another_backend_is_followed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(backend="onnx:openvino")
    assert read_tuned(path) == Tuned("latency", "onnx:openvino", 2, "Test CPU")


@pytest.mark.parametrize("machine", ["Other CPU", None])
def test_elsewhere_the_defaults_apply(
    make: Any,
    machine: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make()
    monkeypatch.setattr(tuned, "cpu_model", lambda: machine)
    with caplog.at_level(logging.INFO):
        assert options(path) == ("onnx:cpu", None)
    assert "tuned for another machine (Test CPU)" in caplog.text


@pytest.mark.parametrize(
    "backend",
    ["onnx:tensorrt", "onnx:webgpu", "torch"],  # the second may be of a later release
)
def test_a_backend_that_is_not_here(
    make: Any,
    backend: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuned, "machine_of", lambda backend: "Test CPU")
    with caplog.at_level(logging.INFO):
        assert options(make(backend=backend)) == ("onnx:cpu", None)
    assert f"tuned for {backend}, which does not run here" in caplog.text


def test_a_card_is_known_by_its_driver(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(backend="onnx:cuda", threads=None, machine="NVIDIA L4")
    monkeypatch.setattr(tuned, "_GPUS", tmp_path / "gpus")
    assert tuned.machine_of("trt") is None and read_tuned(path) is None
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    information = "Model: \t\t NVIDIA L4\nIRQ:   \t\t 48\n"
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text(information)
    assert tuned.machine_of("onnx:cuda") == "NVIDIA L4"
    assert tuned.machine_of("onnx:openvino") == "Test CPU"
    assert read_tuned(path) == Tuned("latency", "onnx:cuda", None, "NVIDIA L4")


def test_a_backend_that_is_asked_for_is_no_matter_of_taste(make: Any) -> None:
    with pytest.raises(BackendError, match="onnx:webgpu"):
        load(make(), backend="onnx:webgpu")


@pytest.mark.parametrize(
    "changes",
    [
        *({"threads": 0}, {"threads": True}, {"threads": "2"}, {"threads": 1.5}),
        *({"backend": "auto"}, {"backend": None}, {"machine": 7}, {"objective": []}),
    ],
)
def test_damaged(make: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="found a damaged one; export the model again"):
        load(make(**changes))


@pytest.mark.parametrize("record", [7, "latency", [], {}, {"backend": "onnx"}])
def test_something_else(record: object) -> None:
    with pytest.raises(ArtifactError, match="a damaged one"):
        Tuned.from_record(record, Path("model.onnx"))


def test_files_without_a_choice(model_files: dict[str, Path]) -> None:
    assert read_tuned(model_files["onnx"]) is None
    assert read_tuned(Path("model.engine")) is None
    assert read_tuned(Path("student.safetensors")) is None


def test_a_copy_keeps_what_was_chosen(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(make()) as predictor:
        monkeypatch.setattr(tuned, "cpu_model", lambda: "Other CPU")
        with pickle.loads(pickle.dumps(predictor)) as copy:
            assert copy._backend.options.threads == 2
