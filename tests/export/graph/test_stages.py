"""Stages without a shuffle: by the network's own, alone and on random weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from efficientface_export.graph.channel_layout import PROFILES, Profile
from efficientface_export.graph.onnx_builder import Map
from efficientface_export.graph.stages import StageWriter
from tests.export.graph.test_efficientface import arrays, lively

PROFILE_OF = {
    **PROFILES,
    "slices": Profile(slices=True),
    "merged": Profile(merge_branches=True),
    "merged, read whole": Profile(
        merge_branches=True, slices=True, first_read_whole=("stage3",), align=16
    ),
}


def write(writer: StageWriter, stage: str, x: Map, count: int) -> tuple[onnx.ModelProto, Map]:
    made = writer.stage(stage, x)
    graph = helper.make_graph(
        writer.nodes,
        "stage",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", count, x.side, x.side])],
        [helper.make_tensor_value_info(made.name, TensorProto.FLOAT, None)],
        initializer=writer.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), made


@pytest.mark.parametrize("name", PROFILE_OF)
@pytest.mark.parametrize("stage", ["stage3", "stage4"])
def test_a_stage_is_the_modules(name: str, stage: str) -> None:
    model = lively()
    module = getattr(model, stage)
    count = model.state_dict()[f"{stage}.0.branch1.0.weight"].shape[0]
    pixels = torch.rand(2, count, 8, 8)  # not negative, as after a ReLU
    with torch.no_grad():
        expected = module(pixels).numpy()
    writer = StageWriter(arrays(model), PROFILE_OF[name])
    graph, made = write(writer, stage, Map("x", tuple(range(count)), 8), count)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"x": pixels.numpy()})[0]
    assert made.side == 4 and sorted(c for c in made.channels if c is not None) == list(
        range(expected.shape[1])
    )
    for place, channel in enumerate(made.channels):
        if channel is not None:
            scale = np.abs(expected).max()
            assert np.abs(found[:, place] - expected[:, channel]).max() <= 1e-5 * scale


def test_batch_norm_is_folded() -> None:
    model = lively()
    writer = StageWriter(arrays(model), Profile())
    weight, bias = map(torch.from_numpy, writer.folded("conv1.0", "conv1.1"))
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = model.conv1[1](model.conv1[0](pixels))
    found = torch.nn.functional.conv2d(pixels, weight, bias, stride=2, padding=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
