"""Facial expressions at the edge: load a model, give it a face, get a label.

>>> import efficientface_deploy as ef
>>> predictor = ef.load()
>>> predictor("face.jpg").label
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime 1.29 and newer write a database and an identifier below HOME and read the machine's
# model, from their import on, unless this is set before it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from efficientface_deploy.errors import (
        ArtifactError,
        BackendError,
        ConfigError,
        EfficientFaceError,
        ImageError,
        ProbeError,
    )
    from efficientface_deploy.predictor import (
        FacePrediction,
        FrameResult,
        Prediction,
        Predictor,
        load,
    )
    from efficientface_deploy.spec import PRESETS, ModelSpec
    from efficientface_deploy.vision.detectors import open_detector
    from efficientface_deploy.vision.faces import Face, FaceDetector
    from efficientface_deploy.vision.video import VideoFrame, open_video

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "ArtifactError",
    "BackendError",
    "ConfigError",
    "EfficientFaceError",
    "Face",
    "FaceDetector",
    "FacePrediction",
    "FrameResult",
    "ImageError",
    "ModelSpec",
    "Prediction",
    "Predictor",
    "ProbeError",
    "VideoFrame",
    "__version__",
    "load",
    "open_detector",
    "open_video",
]

# A library stays silent until the application configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Imported when they are asked for: a command begins here too, and must be able to say in one line
# that it was interrupted, or that numpy is missing.
_MODULES = {
    "errors": (
        *("ArtifactError", "BackendError", "ConfigError"),
        *("EfficientFaceError", "ImageError", "ProbeError"),
    ),
    "predictor": ("FacePrediction", "FrameResult", "Prediction", "Predictor", "load"),
    "spec": ("PRESETS", "ModelSpec"),
    "vision.detectors": ("open_detector",),
    "vision.faces": ("Face", "FaceDetector"),
    "vision.video": ("VideoFrame", "open_video"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
