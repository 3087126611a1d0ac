"""What TensorRT for RTX builds of our network: precision x GPU x graph, by the real compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from efficientface_deploy.errors import ExportError
from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.predictor import BUNDLED_WEIGHTS
from efficientface_deploy.spec import preset
from efficientface_export.graph.channel_layout import PROFILES
from efficientface_export.graph.efficientface import deploy_graph
from efficientface_export.graph.io import write_onnx
from efficientface_export.graph.precision import to_fp16
from efficientface_export.graph.trace import trace
from efficientface_export.int8.placement import lay_out_for_gpu
from efficientface_export.int8.qdq import SCHEMES, quantise
from efficientface_export.int8.ranges import tensor_ranges
from efficientface_export.tensorrt.build_log import EngineCost
from efficientface_export.tensorrt.builder import build_engine
from efficientface_export.tensorrt.options import EngineOptions

REFUSED = 0  # before the build: FP16 is all that there is on Turing

# Kernels of one inference, at most; the bundled weights at 96 pixels, TensorRT for RTX 1.7.1.
KERNELS = {
    ("plain", "fp32"): {"sm75": REFUSED, "sm86": 100, "sm89": 100, "sm120": 100},
    ("plain", "fp16"): {"sm75": 140, "sm86": 104, "sm89": 104, "sm120": 104},
    ("plain", "int8"): {"sm75": REFUSED, "sm86": 104, "sm89": 104, "sm120": 104},
    ("deploy", "fp32"): {"sm75": REFUSED, "sm86": 82, "sm89": 82, "sm120": 82},
    ("deploy", "fp16"): {"sm75": 114, "sm86": 80, "sm89": 80, "sm120": 80},
    ("deploy", "int8"): {"sm75": REFUSED, "sm86": 80, "sm89": 80, "sm120": 80},
}
QUICK = {("deploy", "fp16", "sm89"), ("deploy", "fp32", "sm75"), ("deploy", "int8", "sm75")}

CASES = [
    pytest.param(
        *case,
        gpu,
        kernels,
        id="-".join((*case, gpu)),
        marks=() if (*case, gpu) in QUICK else pytest.mark.slow,
    )
    for case, outcomes in KERNELS.items()
    for gpu, kernels in outcomes.items()
]


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The bundled network for a GPU, by layout and precision; each is made once."""
    folder = tmp_path_factory.mktemp("graphs")
    network, spec = load_checkpoint(BUNDLED_WEIGHTS)
    side = spec.input_size
    images = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)

    @functools.cache
    def plain() -> onnx.ModelProto:
        return trace(network, spec)

    def convert(layout: str, precision: str) -> onnx.ModelProto:
        if layout == "plain":
            graph = plain()
        else:
            weights = {name: value.numpy() for name, value in network.state_dict().items()}
            graph = deploy_graph(weights, spec, PROFILES["gpu"])
        if precision == "int8":
            graph, left_out = lay_out_for_gpu(graph)
            graph = quantise(graph, tensor_ranges(graph, images), SCHEMES["gpu"], left_out)
        return graph if precision == "fp32" else to_fp16(graph)

    def make(layout: str, precision: str) -> Path:
        path = folder / f"{layout}-{precision}.onnx"
        if not path.exists():
            write_onnx(convert(layout, precision), path, spec, {"precision": precision})
        return path

    return make


@pytest.mark.parametrize(("layout", "precision", "gpu", "kernels"), CASES)
def test_outcome(
    graph_file: Callable[[str, str], Path], layout: str, precision: str, gpu: str, kernels: int
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx", exc_type=ImportError)
    path, options = graph_file(layout, precision), EngineOptions(compute_capabilities=(gpu,))
    if kernels == REFUSED:
        with pytest.raises(ExportError, match="an FP16 graph for sm75"):
            build_engine(path, "trt-rtx", options)
        return
    engine = build_engine(path, "trt-rtx", options)
    assert engine.precisions.keys() == ({"fp16", "int8"} if precision == "int8" else {precision})
    assert kernels / 2 < engine.kernels <= kernels
    assert engine.size < 13e6


@pytest.mark.parametrize(
    ("gpu", "side"),
    [
        ("sm89", 112),
        *(
            pytest.param(gpu, side, marks=pytest.mark.slow)
            for gpu, side in [
                *((gpu, 112) for gpu in ("sm80", "sm86", "sm120", "sm121")),
                *(("sm89", side) for side in (64, 96, 160, 224)),
            ]
        ),
    ],
)
def test_int8_costs_no_more_than_fp16(
    gpu: str, side: int, make_network: Callable[..., EfficientFace], tmp_path: Path
) -> None:
    """In kernels and bytes, whatever the weights; and no layer that a search leaves out costs."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx", exc_type=ImportError)
    spec, options = (
        preset("rafdb").replace(input_size=side),
        EngineOptions(compute_capabilities=(gpu,)),
    )
    weights = {name: value.numpy() for name, value in make_network().state_dict().items()}
    graph = deploy_graph(weights, spec, PROFILES["gpu"])
    shape = (2, side, side, 3)
    ranges = tensor_ranges(graph, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    prepared, left_out = lay_out_for_gpu(graph)
    searched = left_out | {"stage3.0.in", "stage3.4.branch2.in", "conv5"}

    def cost(graph: onnx.ModelProto) -> EngineCost:
        path = tmp_path / "model.onnx"
        write_onnx(to_fp16(graph), path, spec, {"precision": "any"})
        found = build_engine(path, "trt-rtx", options).cost
        assert found is not None
        return found

    fp16 = cost(graph)
    int8, less = (
        cost(quantise(prepared, ranges, SCHEMES["gpu"], names)) for names in (left_out, searched)
    )
    assert int8.kernels <= fp16.kernels and less.kernels <= fp16.kernels
    assert int8.bytes_moved < 0.92 * fp16.bytes_moved
    assert int8.bytes_moved < less.bytes_moved < fp16.bytes_moved
    assert not int8.exceeds(fp16) and fp16.exceeds(int8)
