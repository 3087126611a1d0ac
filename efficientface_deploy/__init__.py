"""Facial expressions at the edge: load a model, give it a face, get a label.

>>> import efficientface_deploy as ef
>>> predictor = ef.load()
>>> predictor("face.jpg").label
"""

import logging

from efficientface_deploy.errors import BackendError, EfficientFaceError, ProbeError
from efficientface_deploy.predictor import FacePrediction, FrameResult, Prediction, Predictor, load
from efficientface_deploy.spec import PRESETS, ModelSpec
from efficientface_deploy.vision.detectors import open_detector
from efficientface_deploy.vision.faces import Face, FaceDetector
from efficientface_deploy.vision.video import open_video

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BackendError",
    "EfficientFaceError",
    "Face",
    "FaceDetector",
    "FacePrediction",
    "FrameResult",
    "ModelSpec",
    "Prediction",
    "Predictor",
    "ProbeError",
    "__version__",
    "load",
    "open_detector",
    "open_video",
]

# A library stays silent until the application configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())
