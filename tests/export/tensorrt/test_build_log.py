"""What the builder's log says."""

from __future__ import annotations

import logging

import pytest
from onnx import helper

from efficientface_export.tensorrt.build_log import builder_reason, parse_layers


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (["No room for node_conv2d_2 + node_relu"], "Conv node node_conv2d_2: No room for"),
        (["node_conv2d_21 failed"], "node_conv2d_21 failed"),
        (["Out of memory\nat x.cpp", "in {ForeignNode[fc]}"], "Gemm node fc: Out of memory at x"),
        (["[catchCudaError] no GPU", "stage/0/conv broke"], "Conv node stage/0/conv: stage/0"),
        (["[catchCudaError] no GPU"], "[catchCudaError] no GPU"),
        ([], "no reason given"),
    ],
)
def test_first_error_and_its_node(errors: list[str], expected: str) -> None:
    nodes = [
        helper.make_node(operator, ["x"], ["y"], name)
        for operator, name in (
            ("Conv", "node_conv2d_2"),
            ("Conv", "node_conv2d"),
            ("Conv", "stage/0/conv"),
            ("Conv", "conv"),
            ("Gemm", "fc"),
            ("Relu", ""),
        )
    ]
    graph = helper.make_model(helper.make_graph(nodes, "test", [], []))
    records = [(logging.WARNING, "fc is slow"), *((logging.ERROR, text) for text in errors)]
    assert builder_reason(records, graph).startswith(expected)


RTX_LISTING = """Layers:
Name: __mye_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , \
StreamId: 0
Name: __myl_CastMul_1, LayerType: kgen, Inputs: [ { Name: image, Dimensions: [-1,32,32,3], \
Strides: [3072,96,3,1], Datatype: UInt8, Format: (Linear) Row major linear format }], \
Constants: [ { Name: c, Dimensions: [1], Datatype: Half, Format: (NHWC) x }], Outputs: []
Name: conv1_2, LayerType: correlation, Inputs: [ { Name: r, Dimensions: [-1,4,32,32], \
Datatype: Half, Format: (NHWC) Channel major format }], Constants: [ { Name: b, \
Datatype: Float, Format: (Linear) x }], Outputs: []
Name: __myl_CorrRelu_3, LayerType: runtime_fusion, Inputs: [ { Name: a, Datatype: Int8, F: x }]
Name: __myl_FcAddRelu_4, LayerType: runtime_fusion, Inputs: [ { Name: a, Datatype: Half, F: x }]
Name: w_5, LayerType: wait, Inputs: [], Outputs: []

I/O Tensors:
 Name: image, IOMode: Input, DataType: UInt8, Dimensions: [-1,32,32,3], Location: Device
"""


TENSORRT_LISTING = """Engine Layer Information:
Name: Reformatting CopyNode, LayerType: Reformat, Inputs: [ { Name: in, Location: Device, \
Dimensions: [1,3,224,224], Format/Datatype: Row major linear FP32 format }], Outputs: []
Name: w + conv, LayerType: CaskConvolution, Inputs: [ { Name: x, Location: Device, \
Dimensions: [4,64,56,56], Format/Datatype: Thirty-two wide channel vectorized row major Int8 \
format }], Outputs: [], Weights: {"Type": "Int8", "Count": 864}, Bias: {"Type": "Float"}
Name: conv2, LayerType: CaskConvolution, Inputs: [ { Name: y, Location: Device, \
Dimensions: [1,3,224,224], Format/Datatype: Half }], Outputs: []
"""


def test_listing_of_tensorrt_for_rtx() -> None:
    layers = parse_layers(["Graph optimization time: 0.1 s", RTX_LISTING, "Adding 1 engine(s)"])
    facts = [(x.type, x.precision, x.is_kernel, x.is_convolution) for x in layers]
    assert facts == [
        ("shape_call", "", False, False),
        ("kgen", "", True, False),
        ("correlation", "fp16", True, True),
        ("runtime_fusion", "int8", True, True),
        ("runtime_fusion", "fp16", True, False),
        ("wait", "", False, False),
    ]


def test_listing_of_tensorrt() -> None:
    layers = parse_layers([TENSORRT_LISTING])
    facts = [(x.name, x.precision, x.is_convolution) for x in layers]
    assert facts == [
        ("Reformatting CopyNode", "fp32", False),
        ("w + conv", "int8", True),
        ("conv2", "fp16", True),
    ]


def test_log_without_a_listing() -> None:
    assert parse_layers(["Layers are fused", "done"]) == ()
