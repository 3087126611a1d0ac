"""Reading and writing our ONNX files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from efficientface_deploy.artifact import FEATURES, OUTPUTS, PROVENANCE_KEY, SPEC_KEY
from efficientface_deploy.errors import ArtifactError, ExportError, SpecError
from efficientface_deploy.models import EfficientFace
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import normalise
from efficientface_export.graph.io import multiply_adds, read_onnx, with_features, write_onnx
from efficientface_export.graph.precision import to_fp16
from efficientface_export.verification.parity import features_difference


@pytest.fixture
def tiny() -> onnx.ModelProto:
    """The smallest graph that is one."""
    value = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N"])
        for name in ("input", "output")
    ]
    node = onnx.helper.make_node("Relu", ["input"], ["output"])
    graph = onnx.helper.make_graph([node], "tiny", value[:1], value[1:])
    opset = onnx.helper.make_opsetid("", 19)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)


def test_round_trip(tiny: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.onnx"
    before = tiny.SerializeToString()
    write_onnx(tiny, path, small_spec, {"precision": "fp32", "nested": {"a": [1, 2.5]}})
    assert tiny.SerializeToString() == before
    graph, spec, provenance = read_onnx(path)[:3]
    assert graph.graph == tiny.graph
    assert spec == small_spec
    assert provenance == {"precision": "fp32", "nested": {"a": [1, 2.5]}}


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8 cpu", "int8 gpu"])
def test_features(
    kind: str,
    graph: onnx.ModelProto,
    network: EfficientFace,
    small_spec: ModelSpec,
    images: np.ndarray,
    int8_of: Callable[..., onnx.ModelProto],
) -> None:
    """A third output, of every precision, beside the same first two."""

    def convert(graph: onnx.ModelProto) -> onnx.ModelProto:
        precision, _, target = kind.partition(" ")
        if precision == "int8":
            graph = int8_of(graph, images, target=target)
        return to_fp16(graph) if precision == "fp16" or target == "gpu" else graph

    before = graph.SerializeToString()
    found = convert(with_features(graph))
    assert graph.SerializeToString() == before
    onnx.checker.check_model(found, full_check=True)
    assert [value.name for value in found.graph.output] == [*OUTPUTS, FEATURES]
    logits, _, features = run(found, images)
    with torch.inference_mode():
        pixels = torch.from_numpy(normalise(images, small_spec))
        expected = network.features(pixels).numpy()
    assert (features.dtype, features.shape) == (np.float32, (len(images), 1024))
    off = features_difference(expected, features)
    assert off < {"fp32": 1e-5, "fp16": 0.05}.get(kind, 0.5)
    np.testing.assert_array_equal(logits, run(convert(graph), images)[0])


def run(graph: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    """Every output, computed as the graph is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, {"image": images})
    return found


def test_foreign_metadata_goes(
    tiny: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path
) -> None:
    onnx.helper.set_model_props(tiny, {"path": "/home/somebody"})
    write_onnx(tiny, tmp_path / "model.onnx", small_spec, {})
    metadata = {prop.key for prop in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert metadata == {SPEC_KEY, PROVENANCE_KEY}


def test_invalid_graph_is_not_written(
    tiny: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    tiny.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ExportError, match="a valid ONNX graph"):
        write_onnx(tiny, path, small_spec, {})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("model.onnx", b"the old one")
    ]


def test_weights_outside_the_file_are_not_followed(
    tiny: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path
) -> None:
    """A file from elsewhere may name any path as the place of its weights."""
    weight = onnx.numpy_helper.from_array(np.zeros(3, dtype=np.float32), "w")
    tiny.graph.initializer.append(weight)
    onnx.external_data_helper.set_external_data(tiny.graph.initializer[0], "/etc/passwd")
    onnx.helper.set_model_props(tiny, {SPEC_KEY: small_spec.to_json()})
    (tmp_path / "model.onnx").write_bytes(tiny.SerializeToString())
    with pytest.raises(ArtifactError, match="found weights at '/etc/passwd'"):
        read_onnx(tmp_path / "model.onnx")


def test_weights_beside_the_file_are_not_followed(
    tiny: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path
) -> None:
    """What is exported is one file; a tensor of a node is looked at as well."""
    (tmp_path / "weights.bin").write_bytes(bytes(12))
    value = onnx.numpy_helper.from_array(np.zeros(3, dtype=np.float32), "w")
    onnx.external_data_helper.set_external_data(value, "weights.bin")
    tiny.graph.node.append(onnx.helper.make_node("Constant", [], ["unused"], value=value))
    onnx.helper.set_model_props(tiny, {SPEC_KEY: small_spec.to_json()})
    (tmp_path / "model.onnx").write_bytes(tiny.SerializeToString())
    with pytest.raises(ArtifactError, match="its weights are in other files"):
        read_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not protobuf at all", b"\x08\x09"])
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(
        ArtifactError, match=r"model\.onnx: expected an ONNX model, found a damaged"
    ):
        read_onnx(path)


def test_truncated(tiny: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(tiny, path, small_spec, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        read_onnx(path)


@pytest.mark.parametrize("content", ["[]", "3", "nonsense", '{"a":'])
def test_damaged_provenance(
    tiny: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path, content: str
) -> None:
    props = {SPEC_KEY: small_spec.to_json(), PROVENANCE_KEY: content}
    onnx.helper.set_model_props(tiny, props)
    onnx.save(tiny, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match=PROVENANCE_KEY):
        read_onnx(tmp_path / "model.onnx")


def test_damaged_spec(tiny: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path) -> None:
    fields = {**json.loads(small_spec.to_json()), "input_size": 33}
    onnx.helper.set_model_props(tiny, {SPEC_KEY: json.dumps(fields)})
    onnx.save(tiny, tmp_path / "model.onnx")
    with pytest.raises(SpecError, match=r"model\.onnx"):
        read_onnx(tmp_path / "model.onnx")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_onnx(tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="a folder"):
        read_onnx(tmp_path)


def test_multiply_adds_see_weights_through_qdq_pairs() -> None:
    """A 3x3 convolution, 2 to 4 channels, on 5x5 without padding: 4 x 2 x 9 x 9."""
    make, float32 = onnx.helper.make_node, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.zeros((4, 2, 3, 3), np.int8), "stored")
    scale = onnx.numpy_helper.from_array(np.float32(0.1), "scale")
    zero = onnx.numpy_helper.from_array(np.int8(0), "zero")
    nodes = [
        make("DequantizeLinear", ["stored", "scale", "zero"], ["weight"]),
        make("Conv", ["input", "weight"], ["output"]),
    ]
    inputs = [onnx.helper.make_tensor_value_info("input", float32, ["N", 2, 5, 5])]
    outputs = [onnx.helper.make_tensor_value_info("output", float32, ["N", 4, 3, 3])]
    graph = onnx.helper.make_graph(nodes, "qdq", inputs, outputs, [weight, scale, zero])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
    assert multiply_adds(model) == 4 * 2 * 9 * 9
