"""load(), Predictor and Prediction: what an application embeds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from efficientface_deploy.backends import (
    Backend,
    BackendOptions,
    create_backend,
    missing_reason,
    resolve_backend,
)
from efficientface_deploy.errors import BackendError, ImageError
from efficientface_deploy.preprocess import Float32Array, ImageSource, UInt8Array, to_model_input
from efficientface_deploy.spec import ModelSpec

WEIGHTS = Path(__file__).parent / "weights"
BUNDLED_ONNX = WEIGHTS / "efficientface-ferplus.onnx"
BUNDLED_WEIGHTS = WEIGHTS / "efficientface-ferplus.safetensors"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says about one face.

    Attributes:
        label: The most probable class.
        confidence: Its probability, 0 to 1.
        probabilities: Every class with its probability, in the order of the model's labels.
    """

    label: str
    confidence: float
    probabilities: dict[str, float]


class Predictor:
    """A model ready to label faces; made by :func:`load`.

    Args:
        backend: An open backend.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def spec(self) -> ModelSpec:
        """The model's labels, input size and normalisation."""
        return self._backend.spec

    @property
    def backend(self) -> str:
        """What runs the model, e.g. ``onnx:cpu``."""
        return self._backend.name

    @property
    def path(self) -> Path:
        """The model file."""
        return self._backend.path

    @property
    def provenance(self) -> dict[str, Any]:
        """How the artifact was made: precision, parent's hash, verification, versions."""
        return self._backend.provenance

    def __call__(self, image: ImageSource) -> Prediction:
        """Label one face.

        Args:
            image: Path, bytes of an image file, PIL image, or uint8 RGB array (H, W, 3).

        Raises:
            ImageError: The image cannot be used.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Iterable[ImageSource]) -> list[Prediction]:
        """Label several faces in one pass; an empty list gives an empty list.

        Args:
            images: As for a single call, in any mixture.

        Raises:
            ImageError: One of the images cannot be used, or what was given is a single image.
        """
        _check_several(images)
        inputs = [self.preprocess(image) for image in images]
        if not inputs:
            return []
        probabilities = self._backend.infer(np.stack(inputs)).probabilities  # (N, C)
        return [self._prediction(row) for row in probabilities]

    def preprocess(self, image: ImageSource) -> UInt8Array:
        """The model's input for an image: uint8 (S, S, 3), RGB."""
        return to_model_input(image, self.spec)

    def infer(self, images: UInt8Array) -> tuple[Float32Array, Float32Array]:
        """Run preprocessed images.

        Args:
            images: uint8 (N, S, S, 3), RGB.

        Returns:
            Logits and probabilities, float32 (N, C).
        """
        output = self._backend.infer(images)
        return output.logits, output.probabilities

    def close(self) -> None:
        """Free the model; using the predictor afterwards is an error."""
        self._backend.close()

    def _prediction(self, row: Float32Array) -> Prediction:
        best = int(row.argmax())
        probabilities = dict(zip(self.spec.labels, row.tolist(), strict=True))
        return Prediction(self.spec.labels[best], float(row[best]), probabilities)

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        spec = self.spec
        size = spec.input_size
        state = ", preliminary" if spec.preliminary else ""
        return (
            f"Predictor({self.path.name!r}, backend={self.backend!r}, "
            f"{spec.name}{state}, {spec.num_classes} classes, {size}x{size})"
        )


def _check_several(images: object) -> None:
    """Refuse a single image: its rows, bytes or characters would pass for images."""
    single = isinstance(images, (str, os.PathLike, bytes, bytearray, Image.Image))
    if isinstance(images, np.ndarray):
        single = images.ndim < 3 or (images.ndim == 3 and images.shape[-1] in (3, 4))
    if single:
        raise ImageError(
            "batch",
            expected="several images",
            found=f"a single one ({type(images).__name__})",
            fix="call the predictor itself, or put the image into a list",
        )


def load(
    model: str | Path | None = None,
    *,
    backend: str = "auto",
    threads: int | None = None,
    preset: str | None = None,
) -> Predictor:
    """Load a model.

    Args:
        model: ``*.onnx``, ``*.engine``, ``*.rtx.engine``, ``*.safetensors`` or a published
            ``*.pth.tar``; None loads the bundled model.
        backend: ``auto`` (by the file), or ``onnx``, ``onnx:cuda``, ``trt``, ``trt-rtx``,
            ``torch``, ...; what is asked for is what runs, or it is an error.
        threads: CPU threads for one inference; None leaves the choice to the library.
        preset: What a published checkpoint was trained on, which it does not say itself: labels,
            normalisation and input size. Every other file carries its own; the labels must agree.

    Raises:
        EfficientFaceError: The file is unusable or contradicts the preset, or the backend is not
            available here.
    """
    if threads is not None and threads < 1:
        raise BackendError(
            "threads", expected="at least 1", found=str(threads), fix="leave it out for all cores"
        )
    path = Path(model) if model is not None else bundled_model(backend)
    name, device = resolve_backend(path, backend)
    opened = create_backend(name, path, BackendOptions(device, threads, preset))
    opened.open()
    return Predictor(opened)


def bundled_model(backend: str = "auto") -> Path:
    """The bundled file that suits a backend: ONNX where ONNX Runtime is there, else weights."""
    wants_torch = backend.partition(":")[0] == "torch"
    if backend == "auto":
        wants_torch = missing_reason("onnx") is not None and missing_reason("torch") is None
    return BUNDLED_WEIGHTS if wants_torch else BUNDLED_ONNX
