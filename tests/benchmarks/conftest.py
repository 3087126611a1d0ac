"""A network that names colours: small, quick, and known to the last prediction."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.artifact import PROVENANCE_KEY, SPEC_KEY
from efficientface_deploy.spec import ModelSpec, preset

LABELS = preset("rafdb").labels
# One corner of the colour cube per class.
COLOURS = np.array([[c & 4, c & 2, c & 1] for c in range(1, 8)], dtype=bool) * 255.0
SIDE = 32


@pytest.fixture(scope="module")
def prepare_faces(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Prepare synthetic faces of 32 pixels, so many to train on and to test."""
    from training import prepare

    def make(train: int, test: int = 7) -> Path:
        folder = tmp_path_factory.mktemp("faces") / "set"
        sizes = f"--train {train} --test {test} --size {SIDE}"
        prepare.main(["synthetic", *sizes.split(), "--out", str(folder)])
        return folder

    return make


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


HEAD: dict[str, Any] = {
    "schema": 1,
    "date": "2026-11-23T20:05:01+00:00",
    "machine": {"board": None, "cpu": "AMD EPYC", "usable_cpus": 2, "gpus": []},
    "software": {"os": "Debian", "python": "3.11.7", "packages": {"onnxruntime": "1.32.0"}},
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "config": {},
    "absent": [
        {"backend": "trt", "model": "", "reason": "pip install 'efficientface-deploy[trt]'"},
        {"backend": "onnx:cuda", "model": "a.onnx", "reason": "no provider"},
        {"backend": "onnx:cuda", "model": "b.onnx", "reason": "no provider"},
    ],
    "warnings": ["the machine was noisy: [3 of 4]"],
    "goals": [],
}


def case(model: str, stage: str, batch: int, **changes: Any) -> dict[str, Any]:
    times = {"min_ms": 0.9, "p50_ms": 1.0, "p90_ms": 1.2, "p99_ms": 2.0}
    fixed = {"backend": "onnx:cpu", "precision": "fp32", "threads": 1, "busy": False}
    fixed |= {"images_per_second": 1234.5, "speedup": {"value": 2.0, "low": 1.9, "high": 2.1}}
    return {"model": model, "stage": stage, "batch": batch, **fixed, **times, **changes}


@pytest.fixture
def latency() -> dict[str, Any]:
    cases = [
        case("a.onnx", "compute", 1),
        case("a.onnx", "compute", 32),
        case("a.onnx", "end to end", 1),
        case("b[1].engine", "compute", 1, backend="trt", threads=None, speedup=None),
    ]
    return {**copy.deepcopy(HEAD), "kind": "latency", "baseline": "a.onnx", "cases": cases}


@pytest.fixture
def accuracy() -> dict[str, Any]:
    row = {"model": "a.onnx", "backend": "onnx:cpu", "precision": "", "bytes": 5 * 2**20}
    row |= {"accuracy": 0.8765, "macro_f1": 0.7, "ece": 0.05, "agreement": 1.0}
    row |= {"mean_kl": 1.5e-7, "max_probability_difference": 0.002}
    data = {"name": "FER+", "split": "validation", "images": 3191}
    return {
        **copy.deepcopy(HEAD),
        "kind": "accuracy",
        "data": data,
        "reference": "a.onnx on onnx:cpu",
        "rows": [row],
    }


@pytest.fixture
def make_case() -> Callable[..., dict[str, Any]]:
    """A row of a latency result."""
    return case


@pytest.fixture
def full_latency(latency: dict[str, Any]) -> dict[str, Any]:
    """A result with everything that the current schema knows."""
    cold = {"model": "a.onnx", "backend": "onnx:cpu", "precision": "fp32", "threads": 1, "runs": 5}
    cold |= {"p50_ms": 101.0, "min_ms": 95.0, "max_ms": 130.0, "load_ms": 80.0}
    cold |= {"first_label_ms": 21.0, "process_ms": 400.0, "peak_bytes": 88 * 2**20}
    pointwise = {"kind": "pointwise convolutions", "us": 600, "share": 0.6, "nodes": 3}
    rest = {"kind": "the rest", "us": 400, "share": 0.4, "nodes": 2, "multiply_adds": 0}
    kinds = [{**pointwise, "multiply_adds": 12_000_000}, rest]
    conv = {"name": "conv5", "operator": "Conv", "kind": "pointwise convolutions", "us": 500}
    pool = {"name": "pool<1>", "operator": "MaxPool", "kind": "the rest", "us": 400}
    layers = [{**conv, "multiply_adds": 9_000_000}, {**pool, "multiply_adds": 0}]
    profile = {"model": "a.onnx", "backend": "onnx:cpu", "precision": "fp32", "threads": 1}
    profile |= {"batch": 1, "runs": 9, "total_us": 1000, "kinds": kinds, "layers": layers}
    engine = {"model": "b[1].engine", "backend": "trt", "precision": "fp16", "threads": None}
    engine["engine_layers"] = [{"name": "x", "kind": "Convolution"}] * 3
    peak = {"threads": 1, "format": "fp32", "multiply_adds_per_second": 8e10, "by": "torch"}
    peak["tried"] = {"numpy": 6e10, "torch": 8e10}
    copy_rate = {"threads": 1, "bytes_per_second": 2e10, "array_bytes": 1 << 28}
    model = {"name": "a.onnx", "network": "FER+", "precision": "fp32", "input_size": 96}
    model |= {"bytes": 5_540_000, "sha256": "ab" * 32, "multiply_adds": 31_200_000}
    for row in latency["cases"]:
        row["p95_ms"] = 1.5
        row["floor"] = {"multiply_adds": 27_500_000, "ms": 0.5, "distance": 2.0}
    latency["cases"][3]["joules_per_image"] = 0.0123
    return {
        **latency,
        "schema": 2,
        "cold": [cold],
        "profiles": [profile, engine],
        "ceilings": {"arithmetic": [peak], "bandwidth": [copy_rate], "gpu": {"fp16": 4e14}},
        "models": [model],
        "goals": [{"goal": "x roofline at most", "wanted": 1.5, "reached": 1.4, "met": True}],
        "something new": {"a later version": "wrote this"},
    }


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layout in the place of torch's export, which takes long to trace."""
    from benchmarks.measure import networks
    from efficientface_export.graph.channel_layout import PROFILES
    from efficientface_export.graph.efficientface import deploy_graph
    from efficientface_export.graph.io import write_onnx

    def export(module: Any, spec: ModelSpec, path: Path, *, float_input: bool) -> None:
        weights = {key: value.numpy() for key, value in module.state_dict().items()}
        graph = deploy_graph(weights, spec, PROFILES["gpu"], float_input=float_input)
        write_onnx(graph, path, spec, {})

    monkeypatch.setattr(networks, "export_onnx", export)


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """PyTorch's number of threads belongs to the process."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def network(tmp_path: Path, quick_export: None) -> Any:
    """EfficientFace at 32x32, with random weights."""
    from benchmarks.measure.networks import efficientface

    return efficientface(32, 0, tmp_path)
