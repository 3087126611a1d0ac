"""Files that were made before the tree was redesigned, at commit 43ba709: they load and answer."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import efficientface_deploy as ef

ARCHIVE = Path(__file__).resolve().parents[1] / "data" / "made-at-43ba709.zip"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),  # the largest difference in a probability
    [
        ("student.safetensors", "artifacts", 1e-5),
        ("artifacts/efficientface-fp32-cpu.onnx", "artifacts", 5e-5),
        ("artifacts/efficientface-fp16-gpu.onnx", "artifacts", 0.05),
        ("int8/efficientface-int8-cpu.onnx", "int8", 0.25),
    ],
)
def test_answers_are_those_stored_then(
    old: Path, name: str, reference: str, tolerance: float, require_backend: Callable[[str], None]
):
    if name.endswith(".safetensors"):
        require_backend("torch")
    with np.load(old / reference / "verify.npz") as stored, ef.load(old / name) as predictor:
        logits = stored["logits"]  # PyTorch's, (N, C)
        _, probabilities = predictor.infer(stored["images"])
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected = exponentials / exponentials.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=tolerance)
        assert (probabilities.argmax(axis=1) == logits.argmax(axis=1)).mean() > 0.9
        if name.endswith(".onnx"):
            assert predictor.provenance["precision"] in name
            assert predictor.provenance["target"] in name


def test_face_is_labelled(old: Path, require_backend: Callable[[str], None]):
    require_backend("torch")
    face = next((old / "faces" / "test").rglob("*.jpg"))
    answers = []
    for name in ("student.safetensors", "artifacts/efficientface-fp32-cpu.onnx"):
        with ef.load(old / name) as predictor:
            assert predictor.spec.input_size == 64
            answers.append(predictor(face))
    weights, onnx = answers
    assert weights.label == onnx.label
    assert weights.confidence == pytest.approx(onnx.confidence, abs=5e-5)


def test_student_of_a_run_loads_and_its_state_is_refused(
    old: Path, require_backend: Callable[[str], None]
):
    require_backend("torch")
    with ef.load(old / "run" / "student.safetensors") as predictor:
        assert predictor.spec.num_classes == 7
    with pytest.raises(ef.EfficientFaceError, match=r"--resume.*student\.safetensors"):
        ef.load(old / "run" / "last.pt")
