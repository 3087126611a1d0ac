"""PyTorch module to ONNX file: uint8 pictures in, logits and probabilities out."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from efficientface_deploy.artifact import FLOAT_INPUT, OUTPUTS, UINT8_INPUT
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import LUMA, normalisation
from efficientface_export.graph.io import IR_VERSION, OPSET, write_onnx


class UInt8Model(nn.Module):
    """The network with the normalisation of :func:`preprocess.normalise` in front.

    Args:
        network: EfficientFace or an LDG, in evaluation mode.
        spec: Gives colour, mean and standard deviation.
    """

    scale: Tensor  # (1, 3, 1, 1), as the other two
    offset: Tensor
    luma: Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.grey = spec.colour == "grey"
        scale, offset = normalisation(spec)
        self.register_buffer("scale", torch.from_numpy(scale).view(1, 3, 1, 1))
        self.register_buffer("offset", torch.from_numpy(offset).view(1, 3, 1, 1))
        self.register_buffer("luma", torch.tensor(LUMA).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (N, S, S, 3) RGB to logits and probabilities, float (N, C)."""
        # The cast comes first: TensorRT transposes no uint8.
        pixels = image.to(self.scale.dtype).permute(0, 3, 1, 2)  # (N, 3, S, S)
        if self.grey:
            pixels = nn.functional.conv2d(pixels, self.luma)  # (N, 1, S, S)
        logits = self.network(pixels * self.scale + self.offset)  # (N, C)
        return logits, logits.softmax(dim=1)


class FloatModel(nn.Module):
    """The network for toolchains without uint8: takes what :func:`preprocess.normalise` gives.

    Args:
        network: EfficientFace or an LDG, in evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Float (N, 3, S, S), normalised, to logits and probabilities, float (N, C)."""
        logits = self.network(image)  # (N, C)
        return logits, logits.softmax(dim=1)


def export_onnx(
    model: nn.Module,
    spec: ModelSpec,
    path: str | Path,
    *,
    float_input: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write an FP32 ONNX file with a dynamic batch.

    Args:
        model: EfficientFace or an LDG; it is put into evaluation mode.
        spec: Its spec, which goes into the file.
        path: Target, replaced atomically.
        float_input: ``input``, float32 (N, 3, S, S), normalised, instead of ``image``, uint8
            (N, S, S, 3), RGB.
        provenance: How it was made; goes into the file.

    Returns:
        ``path``.
    """
    graph = trace(model, spec, float_input=float_input)
    write_onnx(graph, path, spec, provenance or {})
    return Path(path)


def trace(model: nn.Module, spec: ModelSpec, *, float_input: bool = False) -> onnx.ModelProto:
    """Trace a network to an ONNX graph, as :func:`export_onnx` describes."""
    side = spec.input_size
    # Two images: torch.export treats a batch of one as a constant.
    if float_input:
        wrapper: nn.Module = FloatModel(model)
        example = torch.zeros(2, 3, side, side)
        name = FLOAT_INPUT
    else:
        wrapper = UInt8Model(model, spec)
        example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
        name = UINT8_INPUT
    batch = torch.export.Dim("N", min=1, max=65_535)
    with _exporter_quiet():
        program = torch.onnx.export(
            wrapper.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    graph.ir_version = IR_VERSION
    _drop_exporter_notes(graph)
    return graph


def _drop_exporter_notes(graph: onnx.ModelProto) -> None:
    """Remove the exporter's stack traces: they carry this machine's paths and a fifth of the file.

    What remains depends on the weights and the versions alone.
    """
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*graph.graph.value_info, *graph.graph.input, *graph.graph.output]:
        del value.metadata_props[:]


@contextlib.contextmanager
def _exporter_quiet() -> Iterator[None]:
    """Keep the exporter's notes about its own internals from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
