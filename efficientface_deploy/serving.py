"""What runs inside NVIDIA Triton's Python backend; ``efficientface-export --triton`` names it.

A repository's ``model.py`` imports one of these two classes as ``TritonPythonModel``, which is the
name that Triton asks for. So a served picture is decoded and resized by the code that trained,
exported and embedded models use, and the repository holds no code of its own.
"""

from __future__ import annotations

import abc
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficientface_deploy.artifact import FEATURES, ONNX_SUFFIX, OUTPUTS, SPEC_KEY, UINT8_INPUT
from efficientface_deploy.backends import create_backend, resolve_backend
from efficientface_deploy.backends.base import BackendOptions
from efficientface_deploy.errors import EfficientFaceError
from efficientface_deploy.predictor import check_backend
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import to_model_input

PICTURE = "picture"
"""Name of the input that takes the bytes of image files."""

FILE_KEY = "efficientface.file"
"""Parameter of a model that our runtime runs: the name of its file."""


class _Model(abc.ABC):
    """The order of calls of Triton's Python backend."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Called once for each instance, with the model's configuration as JSON."""
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        self._open(args)

    @abc.abstractmethod
    def _open(self, args: Mapping[str, str]) -> None:
        """Make ready; see :meth:`initialize`."""

    @abc.abstractmethod
    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request, in their order."""

    def _input(self, request: Any, name: str) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any]
        values = self._triton.get_input_tensor_by_name(request, name).as_numpy()
        return values

    def _answer(self, outputs: Mapping[str, np.ndarray[Any, Any]]) -> Any:
        tensors = [self._triton.Tensor(name, values) for name, values in outputs.items()]
        return self._triton.InferenceResponse(output_tensors=tensors)

    def _refuse(self, error: EfficientFaceError) -> Any:
        invalid = self._triton.TritonError.INVALID_ARG
        failure = self._triton.TritonError(str(error), invalid)
        return self._triton.InferenceResponse(output_tensors=[], error=failure)


class PreprocessModel(_Model):
    """Bytes of image files, (N, 1), to the network's input, uint8 (N, S, S, 3)."""

    def _open(self, args: Mapping[str, str]) -> None:
        self._spec = ModelSpec.from_json(_parameter(args, SPEC_KEY), source=args["model_name"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request; a picture that cannot be used refuses its own request alone."""
        return [self._prepare(request) for request in requests]

    def _prepare(self, request: Any) -> Any:
        pictures = self._input(request, PICTURE).ravel()
        try:
            # As bytes, never as text: that would be a path on the server.
            images = [to_model_input(bytes(picture), self._spec) for picture in pictures]
        except EfficientFaceError as error:
            return self._refuse(error)
        return self._answer({UINT8_INPUT: np.stack(images)})


class RuntimeModel(_Model):
    """Any file of ours through our own backends: the network's input to its outputs."""

    def _open(self, args: Mapping[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        path = folder / _parameter(args, FILE_KEY)
        requested = "auto"
        if args["model_instance_kind"] == "GPU":
            # An instance is a process; those on other GPUs have theirs.
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
            requested = "onnx:cuda" if path.name.endswith(ONNX_SUFFIX) else requested
        name, device = resolve_backend(path, requested)
        self._backend = create_backend(name, path, BackendOptions(device))
        self._backend.open()
        check_backend(self._backend)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests that Triton put together by one pass through the network."""
        batches = [self._input(request, UINT8_INPUT) for request in requests]
        images = np.concatenate(batches)
        wanted = {name for request in requests for name in request.requested_output_names()}
        try:
            outputs = {}
            if wanted & {*OUTPUTS}:
                found = self._backend.infer(images)
                outputs = dict(zip(OUTPUTS, (found.logits, found.probabilities), strict=True))
            if FEATURES in wanted:
                outputs[FEATURES] = self._backend.features(images)
        except EfficientFaceError as error:
            return [self._refuse(error) for _ in requests]
        ends = np.cumsum([len(batch) for batch in batches])
        return [
            self._answer({name: outputs[name][end - len(batch) : end] for name in _asked(request)})
            for request, batch, end in zip(requests, batches, ends, strict=True)
        ]

    def finalize(self) -> None:
        """Called once, when the model is unloaded."""
        self._backend.close()


def _parameter(args: Mapping[str, str], key: str) -> str:
    text: str = json.loads(args["model_config"])["parameters"][key]["string_value"]
    return text


def _asked(request: Any) -> list[str]:
    names: list[str] = request.requested_output_names()
    return names
