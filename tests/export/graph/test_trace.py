"""The traced graph computes what PyTorch computes, for every batch and in every form."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from efficientface_deploy.artifact import PROBE_KEY, PROVENANCE_KEY, SPEC_KEY
from efficientface_deploy.models import LabelDistributionGenerator, load_checkpoint
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import normalise
from efficientface_export.graph.io import IR_VERSION, OPSET
from efficientface_export.graph.trace import export_onnx, trace

TOLERANCE = 1e-5  # in probability


def expected(model: torch.nn.Module, images: np.ndarray, spec: ModelSpec) -> np.ndarray:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.from_numpy(normalise(images, spec)))
        return logits.softmax(dim=1).numpy()


def noise(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch", [1, 7])
def test_colour(
    graph: Any, network: Any, small_spec: Any, images: Any, infer: Any, batch: int
) -> None:
    logits, probabilities = infer(graph, images[:batch])
    reference = expected(network, images[:batch], small_spec)
    np.testing.assert_allclose(probabilities, reference, atol=TOLERANCE)
    np.testing.assert_allclose(torch.tensor(logits).softmax(1), probabilities, atol=1e-6)


def test_network_says_something(network: Any, small_spec: Any, images: Any) -> None:
    assert len(set(expected(network, images, small_spec).argmax(axis=1))) == 7


@pytest.mark.slow
@pytest.mark.parametrize("size", [96, 224])
def test_other_sizes(network: Any, small_spec: ModelSpec, infer: Any, size: int) -> None:
    spec = small_spec.replace(input_size=size)
    graph = trace(network, spec)
    for batch in (1, 7):
        picture = noise(batch, size)
        reference = expected(network, picture, spec)
        np.testing.assert_allclose(infer(graph, picture)[1], reference, atol=TOLERANCE)


def test_grey(
    grey_graph: Any, network: Any, small_spec: ModelSpec, images: Any, infer: Any
) -> None:
    """A grey model sees the luminance of a colour picture."""
    spec = small_spec.replace(colour="grey")
    for batch in (images[:1], images[:7], noise(7, 64)):
        reference = expected(network, batch, spec)
        np.testing.assert_allclose(infer(grey_graph, batch)[1], reference, atol=TOLERANCE)
    weights = np.array([0.299, 0.587, 0.114])
    grey = (images[:3] @ weights)[..., None].round().astype(np.uint8).repeat(3, axis=-1)
    colour, luminance = infer(grey_graph, images[:3])[1], infer(grey_graph, grey)[1]
    assert np.abs(colour - luminance).max() < 0.02  # rounding to 8 bits
    rgb = expected(network, images[:3], small_spec)
    assert np.abs(colour - rgb).max() > 0.02  # and it is not the colour model


def test_float_input(
    float_graph: Any, network: Any, small_spec: ModelSpec, images: Any, infer: Any
) -> None:
    (value,) = float_graph.graph.input
    assert value.name == "input"
    assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    for batch in (1, 7):
        pixels = normalise(images[:batch], small_spec)
        reference = expected(network, images[:batch], small_spec)
        np.testing.assert_allclose(infer(float_graph, pixels)[1], reference, atol=TOLERANCE)


@pytest.mark.slow
def test_published_weights_at_224(shared: Path, infer: Any) -> None:
    """The reference network's own checkpoint, and the logits that its own code gave."""
    model, spec = load_checkpoint(shared / "reference" / "efficientface_reference.pth.tar", "rafdb")
    stored = np.load(shared / "reference" / "efficientface_reference.npz")
    graph = trace(model, spec, float_input=True)
    logits, _ = infer(graph, stored["input"])
    np.testing.assert_allclose(logits, stored["logits"], rtol=1e-4, atol=1e-4)


def test_signature(graph: onnx.ModelProto, small_spec: ModelSpec) -> None:
    inputs = {value.name: value.type.tensor_type for value in graph.graph.input}
    assert list(inputs) == ["image"]
    dimensions = inputs["image"].shape.dim
    assert inputs["image"].elem_type == onnx.TensorProto.UINT8
    assert dimensions[0].dim_param and [d.dim_value for d in dimensions[1:]] == [64, 64, 3]
    outputs = {value.name: value.type.tensor_type for value in graph.graph.output}
    assert list(outputs) == ["logits", "probabilities"]
    for output in outputs.values():
        assert output.elem_type == onnx.TensorProto.FLOAT
        assert output.shape.dim[0].dim_param == dimensions[0].dim_param
        assert output.shape.dim[1].dim_value == small_spec.num_classes
    assert graph.opset_import[0].version == OPSET
    assert graph.ir_version == IR_VERSION
    assert all(node.domain == "" for node in graph.graph.node)


def test_cast_comes_before_the_transposition(graph: onnx.ModelProto) -> None:
    """TensorRT transposes no uint8."""
    (first,) = [node for node in graph.graph.node if "image" in node.input]
    assert first.op_type == "Cast"


def test_batch_norms_are_folded(graph: onnx.ModelProto) -> None:
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}


def test_nothing_of_this_machine_is_inside(exported: Path) -> None:
    model = onnx.load(exported / "efficientface-fp32-cpu.onnx")
    for weights in model.graph.initializer:
        weights.ClearField("raw_data")  # five million arbitrary bytes hold any short text
    for entry in model.metadata_props:
        if entry.key == PROBE_KEY:
            entry.value = ""  # so do a picture's
    content = model.SerializeToString()
    for secret in (str(Path.home()), str(Path(torch.__file__).parent), str(Path.cwd()), ".py"):
        assert secret.encode() not in content
    assert not re.search(rb"/[a-z_]+/[a-z_]+/", content)


@pytest.mark.slow
def test_trace_is_reproducible(
    float_graph: onnx.ModelProto, network: Any, small_spec: ModelSpec
) -> None:
    again = trace(network, small_spec, float_input=True)
    assert again.graph.SerializeToString(deterministic=True) == float_graph.graph.SerializeToString(
        deterministic=True
    )


@pytest.mark.slow
def test_teacher_exports_too(
    small_spec: ModelSpec,
    infer: Any,
    images: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An LDG; and the exporter says nothing, and leaves loggers and warnings as they were."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level, list(warnings.filters)
    torch.manual_seed(0)
    model = LabelDistributionGenerator(7, "resnet18").eval()
    spec = small_spec.replace(architecture="resnet18")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_onnx(model, spec, tmp_path / "ldg.onnx", provenance={"precision": "fp32"})
    assert (logger.level, list(warnings.filters)) == before
    assert capfd.readouterr() == ("", "")
    metadata = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert metadata == {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: '{"precision": "fp32"}'}
    reference = expected(model, images[:7], spec)
    np.testing.assert_allclose(infer(path, images[:7])[1], reference, atol=TOLERANCE)
