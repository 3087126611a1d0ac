"""Networks to measure, and sessions of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import nn

from efficientface_deploy.models import EfficientFace
from efficientface_deploy.spec import ModelSpec
from efficientface_export.graph.channel_layout import PROFILES
from efficientface_export.graph.efficientface import deploy_graph
from efficientface_export.graph.io import multiply_adds, write_onnx
from efficientface_export.graph.trace import export_onnx


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


def open_session(graph: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU with all its optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


STRAIGHT = "straight"


DEPLOY = "deploy"


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
                weights = {key: value.numpy() for key, value in self.module.state_dict().items()}
                laid_out = deploy_graph(
                    weights, self.spec, PROFILES["cpu"], float_input=float_input
                )
                write_onnx(laid_out, path, self.spec, {"precision": "fp32", "target": "cpu"})
        return path

    def multiply_adds(self) -> int:
        """Those that the network needs for a picture, without what a layout adds."""
        return multiply_adds(onnx.load(self.onnx(STRAIGHT)))
