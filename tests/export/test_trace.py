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
from efficientface_export.graph import IR_VERSION, OPSET
from efficientface_export.trace import export_onnx, trace

from efficientface_deploy.artifact import PROVENANCE_KEY, SPEC_KEY
from efficientface_deploy.errors import ExportError
from efficientface_deploy.models import LabelDistributionGenerator, load_checkpoint
from efficientface_deploy.preprocess import normalise
from efficientface_deploy.spec import ModelSpec

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
    assert len(set(reference.argmax(axis=1))) > batch // 3  # a network that says something


@pytest.mark.parametrize("size", [96, pytest.param(224, marks=pytest.mark.slow)])
def test_other_sizes(network: Any, small_spec: ModelSpec, infer: Any, size: int) -> None:
    spec = small_spec.replace(input_size=size)
    graph = trace(network, spec)
    for batch in (1, 7):
        picture = noise(batch, size)
        reference = expected(network, picture, spec)
        np.testing.assert_allclose(infer(graph, picture)[1], reference, atol=TOLERANCE)


def test_grey(network: Any, small_spec: ModelSpec, images: Any, infer: Any) -> None:
    """A grey model sees the luminance of a colour picture."""
    spec = small_spec.replace(colour="grey")
    graph = trace(network, spec)
    for batch in (images[:1], images[:7], noise(7, 64)):
        reference = expected(network, batch, spec)
        np.testing.assert_allclose(infer(graph, batch)[1], reference, atol=TOLERANCE)
    weights = np.array([0.299, 0.587, 0.114])
    grey = (images[:3] @ weights)[..., None].round().astype(np.uint8).repeat(3, axis=-1)
    colour, luminance = infer(graph, images[:3])[1], infer(graph, grey)[1]
    assert np.abs(colour - luminance).max() < 0.02  # rounding to 8 bits
    rgb = expected(network, images[:3], small_spec)
    assert np.abs(colour - rgb).max() > 0.02  # and it is not the colour model


def test_float_input(
    network: Any, small_spec: ModelSpec, images: Any, infer: Any, tmp_path: Path
) -> None:
    path = export_onnx(network, small_spec, tmp_path / "float.onnx", float_input=True)
    graph = onnx.load(path)
    assert [value.name for value in graph.graph.input] == ["input"]
    for batch in (1, 7):
        pixels = normalise(images[:batch], small_spec)
        reference = expected(network, images[:batch], small_spec)
        np.testing.assert_allclose(infer(path, pixels)[1], reference, atol=TOLERANCE)


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


def test_metadata_and_nothing_of_this_machine(
    network: Any, small_spec: ModelSpec, tmp_path: Path
) -> None:
    path = export_onnx(
        network, small_spec, tmp_path / "model.onnx", provenance={"precision": "fp32"}
    )
    metadata = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert metadata == {SPEC_KEY: small_spec.to_json(), PROVENANCE_KEY: '{"precision": "fp32"}'}
    content = path.read_bytes()
    for secret in (str(Path.home()), str(Path(torch.__file__).parent), str(Path.cwd()), ".py"):
        assert secret.encode() not in content
    assert not re.search(rb"/[a-z_]+/[a-z_]+/", content)


def test_trace_is_reproducible(graph: onnx.ModelProto, network: Any, small_spec: ModelSpec) -> None:
    again = trace(network, small_spec)
    assert again.graph.SerializeToString(deterministic=True) == graph.graph.SerializeToString(
        deterministic=True
    )


def test_exporter_is_quiet_and_leaves_no_trace(
    network: Any, small_spec: ModelSpec, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("torch.onnx")
    before = logger.level, list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(network, small_spec, float_input=True)
    assert (logger.level, list(warnings.filters)) == before
    assert capfd.readouterr() == ("", "")


def test_teacher_exports_too(small_spec: ModelSpec, infer: Any, images: Any) -> None:
    torch.manual_seed(0)
    model = LabelDistributionGenerator(7, "resnet18").eval()
    spec = small_spec.replace(architecture="resnet18")
    graph = trace(model, spec)
    reference = expected(model, images[:7], spec)
    np.testing.assert_allclose(infer(graph, images[:7])[1], reference, atol=TOLERANCE)


def test_invalid_graph_is_not_written(
    graph: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path
) -> None:
    from efficientface_export.graph import write_onnx

    broken = onnx.ModelProto()
    broken.CopyFrom(graph)
    broken.graph.node[3].input[0] = "nowhere"
    with pytest.raises(ExportError, match="a valid ONNX graph"):
        write_onnx(broken, tmp_path / "model.onnx", small_spec, {})
    assert list(tmp_path.iterdir()) == []
