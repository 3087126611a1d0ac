"""The networks in PyTorch and their checkpoints; the ONNX and TensorRT runtimes never come here."""

from efficientface_deploy.models.checkpoint import (
    build_model,
    load_backbone,
    load_checkpoint,
    save_checkpoint,
)
from efficientface_deploy.models.efficientface import EfficientFace
from efficientface_deploy.models.ldg import LabelDistributionGenerator

__all__ = [
    "EfficientFace",
    "LabelDistributionGenerator",
    "build_model",
    "load_backbone",
    "load_checkpoint",
    "save_checkpoint",
]
