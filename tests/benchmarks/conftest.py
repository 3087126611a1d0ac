"""A network that names colours: small, quick, and known to the last prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.artifact import PROVENANCE_KEY, SPEC_KEY
from efficientface_deploy.spec import ModelSpec, preset

LABELS = preset("rafdb").labels
# One corner of the colour cube per class.
COLOURS = np.array([[c & 4, c & 2, c & 1] for c in range(1, 8)], dtype=bool) * 255.0
SIDE = 32


@pytest.fixture
def colours() -> np.ndarray:
    """Grey levels (7, 3), one row per class."""
    return COLOURS


@pytest.fixture
def tiny_spec() -> ModelSpec:
    return preset("rafdb").replace(input_size=SIDE, name="colours")


@pytest.fixture
def make_onnx(tiny_spec: ModelSpec, tmp_path: Path) -> Callable[..., Path]:
    """Write an ONNX model that gives each image the class of the nearest of seven colours."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    def make(
        name: str,
        labels: tuple[str, ...] = LABELS,
        colours: np.ndarray = COLOURS,
        **provenance: object,
    ) -> Path:
        # Nearest colour: the largest of 2 x.c - |c|^2, scaled to probabilities short of 0 and 1.
        scale = 4 / 255**2
        weight = (scale * 2 * colours.T).astype(np.float32)  # (3, 7)
        bias = (-scale * (colours**2).sum(axis=1)).astype(np.float32)  # (7,)
        nodes = [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2], keepdims=0),
            helper.make_node("Gemm", ["mean", "weight", "bias"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ]
        image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIDE, SIDE, 3])
        outputs = [
            helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", len(labels)])
            for output in ("logits", "probabilities")
        ]
        weights = [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(bias, "bias"),
        ]
        graph = helper.make_graph(nodes, "colours", [image], outputs, weights)
        opset = [helper.make_opsetid("", 13)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        spec = tiny_spec.replace(labels=labels)
        helper.set_model_props(
            model, {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: json.dumps(provenance)}
        )
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
        return path

    return make


@pytest.fixture
def student(tiny_spec: ModelSpec, tmp_path: Path) -> Path:
    """A checkpoint of EfficientFace with random weights."""
    pytest.importorskip("torch")
    from efficientface_deploy.models import EfficientFace, save_checkpoint

    path = tmp_path / "student.safetensors"
    save_checkpoint(path, EfficientFace(len(LABELS)).eval(), tiny_spec)
    return path


@pytest.fixture
def colour_data(tmp_path: Path) -> Path:
    """Three images of each colour in the published layout, one of them in a wrong folder."""
    root = tmp_path / "data"
    for label, colour in enumerate(COLOURS):
        for number in range(3):
            misplaced = (label, number) == (0, 2)
            folder = root / "test" / str(1 if misplaced else label)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.broadcast_to(colour.astype(np.uint8), (40, 24, 3))
            Image.fromarray(pixels).save(folder / f"{label}-{number}.png")
    return root
