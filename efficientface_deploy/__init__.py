"""Facial expressions at the edge: load a model, give it a face, get a label.

>>> import efficientface_deploy as ef
>>> predictor = ef.load()
>>> predictor("face.jpg").label
"""

import logging

from efficientface_deploy.errors import BackendError, EfficientFaceError
from efficientface_deploy.predictor import Prediction, Predictor, load
from efficientface_deploy.spec import PRESETS, ModelSpec

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BackendError",
    "EfficientFaceError",
    "ModelSpec",
    "Prediction",
    "Predictor",
    "__version__",
    "load",
]

# A library stays silent until the application configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())
