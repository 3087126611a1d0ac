"""The two models of Triton's Python backend, with a stand-in for Triton's module."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy import load
from efficientface_deploy.artifact import SPEC_KEY
from efficientface_deploy.backends import BackendOptions
from efficientface_deploy.errors import BackendError
from efficientface_deploy.predictor import BUNDLED_ONNX
from efficientface_deploy.serving import FILE_KEY, PICTURE, PreprocessModel, RuntimeModel

SIDE = 112
IMAGES = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), np.uint8)


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values

    def as_numpy(self) -> np.ndarray:
        return self.values


class Request:
    def __init__(self, name: str, values: np.ndarray, outputs: tuple[str, ...] = ()) -> None:
        self.tensor, self.outputs = Tensor(name, values), outputs

    def requested_output_names(self) -> list[str]:
        return list(self.outputs)


class Response:
    def __init__(self, output_tensors: list[Tensor], error: Any = None) -> None:
        self.values = {tensor.name: tensor.values for tensor in output_tensors}
        self.error = error


class TritonError(Exception):
    INVALID_ARG = 3


@pytest.fixture(autouse=True)
def triton(monkeypatch) -> None:
    """What a stub gives to its models."""
    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, Response, TritonError

    def find(request: Request, name: str) -> Tensor:
        assert name == request.tensor.name
        return request.tensor

    module.get_input_tensor_by_name = find
    monkeypatch.setitem(sys.modules, module.__name__, module)


def arguments(folder: Any, **parameters: str) -> dict[str, str]:
    entries = {key: {"string_value": text} for key, text in parameters.items()}
    return {
        "model_name": "efficientface",
        "model_repository": str(folder),
        "model_version": "1",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
        "model_config": json.dumps({"parameters": entries}),
    }


def encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_are_prepared_as_everywhere():
    with load() as predictor:
        model = PreprocessModel()
        model.initialize(arguments("", **{SPEC_KEY: predictor.spec.to_json()}))
        large = np.kron(IMAGES[0], np.ones((3, 2, 1), np.uint8))
        files = np.array([[encode(large)], [encode(IMAGES[1])]], object)
        bad = np.array([[encode(IMAGES[2])], [b"/etc/passwd"]], object)
        good, refused, last = model.execute(
            [Request(PICTURE, files), Request(PICTURE, bad), Request(PICTURE, files[1:])]
        )
        expected = np.stack([predictor.preprocess(large), predictor.preprocess(IMAGES[1])])
    np.testing.assert_array_equal(good.values["image"], expected)
    np.testing.assert_array_equal(last.values["image"], expected[1:])
    assert refused.values == {} and refused.error.args[1] == TritonError.INVALID_ARG
    assert "another kind of file" in str(refused.error.args[0])


@pytest.fixture
def model(tmp_path):
    (tmp_path / "1").mkdir()
    shutil.copy(BUNDLED_ONNX, tmp_path / "1" / "model.onnx")
    opened = RuntimeModel()
    opened.initialize(arguments(tmp_path, **{FILE_KEY: "model.onnx"}))
    yield opened
    opened.finalize()


def test_requests_share_one_pass(model, monkeypatch):
    sizes, infer = [], model._backend.infer
    monkeypatch.setattr(
        model._backend, "infer", lambda images: sizes.append(len(images)) or infer(images)
    )
    names = [("logits", "probabilities"), ("features",), ("probabilities", "features")]
    parts = (IMAGES[:1], IMAGES[1:3], IMAGES[3:])
    answers = model.execute(list(map(Request, ["image"] * 3, parts, names)))
    assert sizes == [6]
    assert [tuple(answer.values) for answer in answers] == names
    with load() as predictor:
        logits, probabilities = predictor.infer(IMAGES)
        features = predictor.features(IMAGES)
    np.testing.assert_array_equal(answers[0].values["logits"], logits[:1])
    np.testing.assert_array_equal(answers[2].values["probabilities"], probabilities[3:])
    np.testing.assert_array_equal(answers[1].values["features"], features[1:3])


def test_what_the_backend_refuses_is_tritons_error(model, monkeypatch):
    def fail(images: np.ndarray) -> None:
        raise BackendError("model.onnx", "finite outputs", "NaN", "export it again")

    monkeypatch.setattr(model._backend, "infer", fail)
    answers = model.execute([Request("image", IMAGES[:2], ("logits",))] * 2)
    assert [str(answer.error.args[0]) for answer in answers] == [
        "model.onnx: expected finite outputs, found NaN; export it again"
    ] * 2


def test_a_wrong_engine_is_not_served(tmp_path, monkeypatch):
    """The file's probe runs where it is served."""
    (tmp_path / "1").mkdir()
    shutil.copy(BUNDLED_ONNX, tmp_path / "1" / "model.onnx")
    monkeypatch.setattr("efficientface_deploy.probe.Probe.difference", lambda *_: float("nan"))
    with pytest.raises(BackendError, match="of their spread beside them"):
        RuntimeModel().initialize(arguments(tmp_path, **{FILE_KEY: "model.onnx"}))


def test_each_instance_has_its_gpu(tmp_path, monkeypatch):
    opened = []

    def create(name: str, path: Path, options: BackendOptions) -> None:
        opened.append((name, options.device, os.environ["CUDA_VISIBLE_DEVICES"]))
        raise BackendError("backend", "a GPU", "none", "get one")

    monkeypatch.setattr("efficientface_deploy.serving.create_backend", create)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu = {"model_instance_kind": "GPU", "model_instance_device_id": "3"}
    for file in ("model.onnx", "model.rtx.engine"):
        with pytest.raises(BackendError, match="expected a GPU"):
            RuntimeModel().initialize({**arguments(tmp_path, **{FILE_KEY: file}), **gpu})
    assert opened == [("onnx", "cuda", "3"), ("trt-rtx", "", "3")]
