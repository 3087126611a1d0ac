"""The process that labels for a product, and each product's way to be called, on stand-ins."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import product as adapter

SCRIPT = Path(adapter.__file__)


def test_every_request_is_answered_on_a_line() -> None:
    requests = io.StringIO('{"pictures": ["a", "b"]}\n{"pictures": []}\n')
    answers = io.StringIO()
    adapter.serve((str.upper, iter(["A", "B"]), "1.2"), requests, answers)
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first["labels"] == ["A", "B"] and second["labels"] == []
    assert len(first["ns"]) == 2 and min(first["ns"]) > 0 and first["cpu_ns"] >= 0
    assert first["classes"] == second["classes"] == ["A", "B"] and first["version"] == "1.2"


def test_the_bundled_model_labels_in_a_process(photo: np.ndarray, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(photo).save(tmp_path / "face.png")
    request = json.dumps({"pictures": [str(tmp_path / "face.png")]}) + "\n"
    command = [sys.executable, str(SCRIPT), "efficientface-deploy", str(tmp_path)]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["labels"] == ["Happiness"] and "Contempt" in answer["classes"]


def test_what_a_product_prints_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("imread = cvtColor = COLOR_BGR2RGB = None")
    (tmp_path / "emotiefflib").mkdir()
    (tmp_path / "emotiefflib" / "facial_analysis.py").write_text("import os; os.system('echo hi')")
    run = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = "
    run += f"['emotiefflib', '.']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "hi\n" in done.stderr and "EmotiEffLibRecognizer" in done.stderr


# ---- the products, each in the form that its documentation shows

PICTURE = np.zeros((48, 40, 3), np.uint8)


class FER:
    def __init__(self, offsets: tuple[int, int]) -> None:
        assert offsets == (0, 0)

    def detect_emotions(self, picture: np.ndarray, boxes: list[tuple[int, ...]]) -> list[Any]:
        assert picture is PICTURE and boxes == [(0, 0, 40, 48)]
        return [{"box": boxes[0], "emotions": {"angry": 0.2, "happy": 0.5, "sad": 0.3}}]


class Recogniser:
    idx_to_emotion_class = {0: "Anger", 1: "Happiness"}  # noqa: RUF012

    def __init__(self, engine: str, model_name: str) -> None:
        assert (engine, model_name) == ("onnx", "enet_b0_8_best_vgaf")

    def predict_emotions(self, picture: np.ndarray, logits: bool) -> tuple[list[str], Any]:
        assert picture.shape == (48, 40, 3) and picture[0, 0, 0] == 1  # converted
        return ["Happiness"], np.zeros((1, 2))


class FacialExpressionRecog:
    def __init__(self, path: str) -> None:
        assert path.endswith("zoo/facial_expression_recognition_mobilefacenet_2022july.onnx")

    def infer(self, picture: np.ndarray) -> np.ndarray:
        assert picture.shape == (112, 112, 3)
        return np.array([3], np.uint8)

    @staticmethod
    def getDesc(index: int) -> str:  # noqa: N802 - its name there
        return ("angry", "disgust", "fearful", "happy", "neutral", "sad", "surprised")[index]


def analyze(path: str, actions: tuple[str], *, detector_backend: str, silent: bool) -> list[Any]:
    assert (path, actions, detector_backend) == ("face.jpg", ("emotion",), "skip")
    return [{"dominant_emotion": "happy"}]


STAND_INS = {
    "fer": {"fer": {}, "fer.fer": {"FER": FER}},
    "deepface": {"deepface": {"DeepFace": types.SimpleNamespace(analyze=analyze)}},
    "emotiefflib": {
        "emotiefflib": {},
        "emotiefflib.facial_analysis": {"EmotiEffLibRecognizer": Recogniser},
    },
    "opencv-zoo": {"facial_fer_model": {"FacialExpressionRecog": FacialExpressionRecog}},
}


@pytest.mark.parametrize("name", STAND_INS)
def test_a_product_is_called_as_it_is_documented(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2 = {
        "__version__": "5.0",
        "imread": lambda path: PICTURE,
        "COLOR_BGR2RGB": 4,
        "cvtColor": lambda picture, code: picture + 1,
        "resize": lambda picture, size: np.zeros((*size, 3), np.uint8),
    }
    for module, content in {**STAND_INS[name], "cv2": cv2}.items():
        stand_in = types.ModuleType(module)
        vars(stand_in).update(content)
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(adapter.importlib.metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.setenv("DEEPFACE_BACKEND_ENGINE", "onnx")
    label, classes, version = adapter.PRODUCTS[name]("zoo")
    assert label("face.jpg").startswith(("happy", "Happiness"))
    assert label("face.jpg") in list(classes)
    assert version == ("5.0" if name == "opencv-zoo" else "1.2")


# ---- face-api, under Node

FACE_API = """
class FaceExpressions {
  constructor(values) { ["neutral", "happy", "sad"].forEach((n, i) => { this[n] = values[i]; }); }
  asSortedArray() { return [{ expression: "happy", probability: 0.5 }]; }
}
console.log("a library's own words");
const nets = { faceExpressionNet: { async loadFromDisk(folder) {
  if (!folder.endsWith("@vladmandic/face-api/model")) throw new Error(folder);
} } };
const recognizeFaceExpressions = async (pixels) => {
  if (pixels.shape.join() !== "48,40,4") throw new Error(pixels.shape);
  return new FaceExpressions([0, 1, 0]);
};
module.exports = { FaceExpressions, nets, recognizeFaceExpressions };
"""
TFJS = """
exports.setBackend = async (name) => { if (name !== "wasm") throw new Error(name); };
exports.ready = async () => {};
exports.tidy = (work) => work();
exports.tensor3d = (data, shape) => ({ shape, slice() { return this; }, dispose() {} });
"""
MODULES = {
    "@vladmandic/face-api/package.json": '{"version": "1.7"}',
    "@vladmandic/face-api/dist/face-api.node-wasm.js": FACE_API,
    "@tensorflow/tfjs/index.js": TFJS,
    "@tensorflow/tfjs-backend-wasm/index.js": "exports.setWasmPaths = () => {};",
    "@canvas/image/index.js": """
exports.imageFromBuffer = async (bytes) => bytes;
exports.getImageData = (bytes) => ({ data: bytes, width: 40, height: 48 });
""",
}


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node")
def test_face_api_answers_from_node(tmp_path: Path) -> None:
    for name, text in MODULES.items():
        path = tmp_path / "node_modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "face.jpg").write_bytes(b"picture")
    request = json.dumps({"pictures": [str(tmp_path / "face.jpg")] * 2}) + "\n"
    done = subprocess.run(
        ["node", str(SCRIPT.with_suffix(".cjs")), str(tmp_path)],
        input=2 * request,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["labels"] == second["labels"] == ["happy", "happy"] and len(first["ns"]) == 2
    assert first["classes"] == ["neutral", "happy", "sad"] and first["cpu_ns"] > 0
    assert first["version"] == "1.7, WebAssembly" and "own words" in done.stderr
