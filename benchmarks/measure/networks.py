"""Networks to measure, and the files that they are converted to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, load_model
from torch import nn

from efficientface_deploy.models import EfficientFace
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_export.graph.channel_layout import PROFILES, Profile
from efficientface_export.graph.efficientface import deploy_graph
from efficientface_export.graph.io import multiply_adds, write_onnx
from efficientface_export.graph.trace import export_onnx

STRAIGHT = "straight"
DEPLOY = "deploy"
MAX_DIFFERENCE = 1e-4  # of the logits, relative to the largest: FP32 sums in another order


def random_network(spec: ModelSpec, seed: int) -> EfficientFace:
    """Random weights, with the batch norm statistics that noise has in them.

    Without these the signal fades from layer to layer, and no difference would reach the logits.
    """
    torch.manual_seed(seed)
    network = EfficientFace(spec.num_classes).train()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(4, 3, spec.input_size, spec.input_size))
    return network.eval()


def relative_difference(found: Float32Array, expected: Float32Array) -> float:
    """Largest difference by the largest expected value; infinite for another shape or NaN."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def efficientface(input_size: int, seed: int, folder: Path) -> Network:
    """EfficientFace with random weights: no arithmetic depends on what it has learnt."""
    spec = preset("rafdb").replace(input_size=input_size)
    return Network("EfficientFace", random_network(spec, seed), spec, folder)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to run, and a folder for the files that it is converted to.

    Attributes:
        name: In tables.
        module: In evaluation mode.
        spec: Input size and normalisation.
        folder: Each file in it is written once and used by all.
    """

    name: str
    module: nn.Module
    spec: ModelSpec
    folder: Path

    def onnx(self, graph: str, *, float_input: bool = False) -> Path:
        """The network as torch exports it (``straight``) or as we do (``deploy``)."""
        path = self.folder / f"{graph}-{'float' if float_input else 'uint8'}.onnx"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            if graph == STRAIGHT:
                export_onnx(self.module, self.spec, path, float_input=float_input)
            else:
                laid_out = self.lay_out(PROFILES["cpu"], float_input=float_input)
                write_onnx(laid_out, path, self.spec, {"precision": "fp32", "target": "cpu"})
        return path

    def lay_out(self, profile: Profile, *, float_input: bool = False) -> ModelProto:
        """The graph that our exporter writes by this profile; for EfficientFace alone."""
        weights = {name: value.numpy() for name, value in self.module.state_dict().items()}
        return deploy_graph(weights, self.spec, profile, float_input=float_input)

    def multiply_adds(self) -> int:
        """Those that the network needs for a picture, without what a layout adds."""
        return multiply_adds(load_model(self.onnx(STRAIGHT)))
