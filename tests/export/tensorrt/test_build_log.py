"""What the builder's log says."""

from __future__ import annotations

import logging

import pytest
from onnx import helper

from efficientface_deploy.spec import ModelSpec
from efficientface_export.tensorrt.build_log import (
    EngineCost,
    builder_fix,
    builder_reason,
    engine_cost,
    parse_layers,
)
from tests.export.tensorrt.test_builder import make_graph


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


# As in issues 3385, 3579 and 4060 of NVIDIA/TensorRT (8.5 and 8.6), and 10.x.
NO_KERNEL = (
    "Could not find any implementation for node w2 + w2_QuantizeLinear + y2.",
    "[optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any "
    "implementation for node w2 + node_of_y2_q + y2 + PWN(y2.sigmoid, y2.mul).)",
    "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any "
    "implementation for node {ForeignNode[w2...y2]}. In computeCosts at leafCNode.cpp:553)",
)
NO_ROOM = "Skipping tactic 0x0 due to insufficient memory on requested size of 8, for tactic 0x0."


@pytest.mark.parametrize("message", NO_KERNEL)
@pytest.mark.parametrize(
    ("precision", "before", "expected"),
    [
        ("int8", "", "FP32 file, with --exclude y2"),
        ("fp16", "", "try another --precision"),
        ("int8", NO_ROOM, "more memory with --workspace"),
    ],
)
def test_layer_without_a_kernel_is_one_to_exclude(
    spec: ModelSpec, message: str, precision: str, before: str, expected: str
) -> None:
    records = [(logging.WARNING, before), (logging.ERROR, message)]
    graph = make_graph(spec, precision)
    assert expected in builder_fix(records, graph)
    assert builder_reason(records, graph).startswith("Conv node y2: ")


def test_two_layers_without_a_kernel(spec: ModelSpec) -> None:
    records = [(logging.ERROR, "Could not find any implementation for node y1 + y2 || y33.")]
    assert builder_fix(records, make_graph(spec, "int8")).endswith("--exclude y1 y2")


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


# The forms of TensorRT's own listings, from public logs and dumps: 8.4 and 8.6 (formats in words),
# 10.x of 2024 with static shapes ("Layers:", bare types), and engines with a dynamic batch, for
# which formats and types are left out. Names and counts are ours.
TENSORRT_8 = """Engine Layer Information:
Name: Reformatting CopyNode, LayerType: Reformat, Inputs: [ { Name: in, Location: Device, \
Dimensions: [1,3,224,224], Format/Datatype: Row major linear FP32 }], Outputs: [ { Name: r, \
Location: Device, Dimensions: [1,3,224,224], Format/Datatype: Row major Int8 format }], \
ParameterType: Reformat, Origin: QDQ, TacticValue: 0x00000000000003ea
Name: w + w_QuantizeLinear + conv, LayerType: CaskConvolution, Inputs: [ { Name: x, \
Location: Device, Dimensions: [4,64,56,56], Format/Datatype: Thirty-two wide channel vectorized \
row major Int8 format }], Outputs: [ { Name: y, Location: Device, Dimensions: [4,64,56,56], \
Format/Datatype: Channel major FP16 format where channel % 8 == 0 }], ParameterType: Convolution, \
Weights: {"Type": "Int8", "Count": 864}, Bias: {"Type": "Float", "Count": 32}, HasReLU: 1
"""
TENSORRT_10 = """Layers:
Name: Reformatting CopyNode for Input Tensor 0 to conv + relu, LayerType: Reformat, Inputs: [ { \
Name: input, Location: Device, Dimensions: [1,3,224,224], Format/Datatype: Half }], Outputs: [ { \
Name: r, Location: Device, Dimensions: [1,3,224,224], Format/Datatype: Half }], ParameterType: \
Reformat, Origin: REFORMAT, TacticValue: 0x00000000000003e8, StreamId: 0, Metadata: \

Name: conv + relu, LayerType: CaskConvolution, Inputs: [ { Name: r, Location: Device, \
Dimensions: [1,3,224,224], Format/Datatype: Half }], Outputs: [ { Name: y, Location: Device, \
Dimensions: [1,64,55,55], Format/Datatype: Half }], ParameterType: Convolution, Kernel: [11,11], \
Weights: {"Type": "Half", "Count": 23232}, Bias: {"Type": "Half", "Count": 64}, HasBias: 1, \
Activation: RELU, TacticName: sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16_f16f16_f16, \
StreamId: 0, Metadata: [ONNX Layer: conv]\x1e[ONNX Layer: relu]
Name: fc_myl9_4, LayerType: gemm, Inputs: [ { Name: y.1_4, Dimensions: [1,4096], \
Format/Datatype: Half }, { Name: __mye574fc_alpha, Dimensions: [1], Format/Datatype: Float }], \
Outputs: [ { Name: output, Dimensions: [1,1000], Format/Datatype: Half }], TacticName: \
sm50_xmma_cublas_gemm, StreamId: 0, Metadata: [ONNX Layer: fc]
Bindings:
input
output
"""
_UNKNOWN = (
    "Location: Device, Dimensions: [-1,128,14,14], Format/Datatype: N/A due to dynamic shapes"
)
TENSORRT_DYNAMIC = f"""Layers:
Name: (Unnamed Layer* 0) [Shuffle], LayerType: NoOp, Inputs: [ {{ Name: foo0, {_UNKNOWN} }}], \
Outputs: [ {{ Name: s, {_UNKNOWN} }}], TacticValue: 0x0000000000000000
Name: node_Conv_292 + node_relu, LayerType: CaskConvolution, Inputs: [ {{ Name: s, {_UNKNOWN} }}], \
Outputs: [ {{ Name: y, {_UNKNOWN} }}], ParameterType: Convolution, Weights: {{"Type": "Half", \
"Count": 9408}}, Bias: {{"Type": "Half", "Count": 64}}
Name: conv_int8, LayerType: CaskConvolution, Inputs: [ {{ Name: y, {_UNKNOWN} }}], Outputs: [ \
{{ Name: z, {_UNKNOWN} }}], ParameterType: Convolution, \
Weights: {{"Type": "Int8", "Count": 13824}}, Bias: {{"Type": "Float", "Count": 12}}, \
HasSparseWeights: 0, Activation: NONE
Name: conv_of_an_unknown_type, LayerType: CudaDepthwiseConvolution, Inputs: [ \
{{ Name: z, {_UNKNOWN} }}], Outputs: [ {{ Name: u, {_UNKNOWN} }}], \
Bias: {{"Type": "Float", "Count": 12}}
"""
TENSORRT_SHORT = """Engine Layer Information:
Layer(Reformat): Reformatting CopyNode for Input Tensor 0 to Conv_0, Tactic: 0x0000000000000000, \
input[Float(-2,3,300,300)] -> Reformatted Input Tensor 0 to Conv_0[Half(-2,3,300,300)]
Layer(CaskConvolution): conv_0 + relu_1, Tactic: 0x4727434768e46395, \
data[Half(-2,3,300,300)] -> y[Float(-2,32,150,150)]
Layer(CaskConvolution): conv_2, Tactic: 0x1025026069226666, y (Int8[-1,32,150,150]) -> z (Half[-1])
Layer(Constant): w + (Unnamed Layer* 1) [Shuffle], Tactic: 0x0,  -> z[Float(1,1,256)]
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


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        (
            TENSORRT_8,
            [("Reformat", "fp32", False), ("CaskConvolution", "int8", True)],
        ),
        (
            TENSORRT_10,
            [
                ("Reformat", "fp16", False),
                ("CaskConvolution", "fp16", True),
                ("gemm", "fp16", False),
            ],
        ),
        (
            TENSORRT_DYNAMIC,
            [
                ("NoOp", "", False),
                ("CaskConvolution", "fp16", True),
                ("CaskConvolution", "int8", True),
                ("CudaDepthwiseConvolution", "", True),
            ],
        ),
        (
            TENSORRT_SHORT,
            [
                ("Reformat", "fp32", False),
                ("CaskConvolution", "fp16", True),
                ("CaskConvolution", "int8", True),
                ("Constant", "", False),
            ],
        ),
    ],
    ids=["8", "10", "dynamic batch", "short form"],
)
def test_listing_of_tensorrt(listing: str, expected: list[tuple[str, str, bool]]) -> None:
    layers = parse_layers(["Engine generation completed in 8.6 seconds.", listing])
    assert [(x.type, x.precision, x.is_convolution) for x in layers] == expected


def test_log_without_a_listing() -> None:
    assert parse_layers(["Layers are fused", "done"]) == ()
    assert engine_cost(()) is None


# Sizes and types as TensorRT for RTX lists them: a batch of -1, constants between the two lists.
RTX_SIZES = """Layers:
Name: s, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0
Name: cast, LayerType: kgen, Inputs: [ { Name: image, Dimensions: [-1,8,8,3], Strides: [192,24,3,\
1], StrideOrder: [3,2,1,0], Datatype: UInt8, Format: (Linear) x }], Constants: [ { Name: m, \
Dimensions: [1,3,1,1], Strides: [3,1,3,3], Datatype: Half, Format: (NHWC) x }], Outputs: [ { Name: \
p, Dimensions: [-1,4,8,8], Strides: [256,1,32,4], Datatype: Half, Format: (NHWC) x }], TacticName: x
Name: conv, LayerType: correlation, Inputs: [ { Name: p, Dimensions: [-1,4,8,8], Strides: [256,1,\
32,4], Datatype: Half, Format: (NHWC) x }, { Name: r, Dimensions: [-1,5], Datatype: Int8, Format: \
x }], Constants: [ { Name: w, Dimensions: [8,4,3,3], Datatype: Int8, Format: (NHWC) x }, { Name: \
b, Dimensions: [8], Datatype: Float, Format: x }, { Name: one, Dimensions: [], Datatype: Float, \
Format: x }], Outputs: [ { Name: y, Dimensions: [-1,8,4,4], Datatype: Float, Format: x }], T: x
"""


def test_bytes_of_one_picture() -> None:
    """A tensor counts for each kernel that touches it, in its own type; what is no kernel, not."""
    cost = engine_cost(parse_layers([RTX_SIZES]))
    cast, convolution = 8 * 8 * 3 + 4 * 64 * 2, 4 * 64 * 2 + 5 + 8 * 16 * 4
    assert cost == EngineCost(2, cast + convolution, 3 * 2 + 8 * 36 + 8 * 4 + 4)
    assert cost.bytes_moved == cast + convolution + 330
    assert str(cost) == "2 kernels, 0.0 MB moved"


def test_bytes_of_tensorrt() -> None:
    """Static shapes have sizes and types, weights are counted; a dynamic batch hides them."""
    reformat, convolution, linear = (
        (layer.activations, layer.constants) for layer in parse_layers([TENSORRT_10])
    )
    assert reformat == (2 * 3 * 224 * 224 * 2, 0)
    assert convolution == ((3 * 224 * 224 + 64 * 55 * 55) * 2, (23232 + 64) * 2)
    assert linear == ((4096 + 1000) * 2 + 4, 0)  # the log calls a constant an input


@pytest.mark.parametrize(
    ("listing", "kernels"),
    [
        (TENSORRT_8, 2),
        (TENSORRT_DYNAMIC, 3),
        (TENSORRT_SHORT, 3),
        (RTX_LISTING, 4),
        (RTX_SIZES.replace("UInt8", "Int2"), 2),
        (RTX_SIZES.replace("Dimensions: [8],", ""), 2),
    ],
    ids=["words", "dynamic batch", "short form", "no sizes", "unknown type", "a size is missing"],
)
def test_bytes_that_the_log_does_not_give(listing: str, kernels: int) -> None:
    cost = engine_cost(parse_layers([listing]))
    assert (cost.kernels, cost.bytes_moved, str(cost)) == (kernels, None, f"{kernels} kernels")


@pytest.mark.parametrize(
    ("own", "other", "exceeds"),
    [
        ((80, 5, 2), (79, 9, 9), True),
        ((79, 5, 3), (79, 5, 2), True),
        ((79, 5, 2), (79, 4, 3), False),
        ((78, 9, 9), (79, 5, 2), True),
        ((79, None, 2), (79, 5, 2), False),
        ((80, None, 2), (79, 5, 2), True),
    ],
)
def test_what_costs_more(own: tuple, other: tuple, exceeds: bool) -> None:
    """More kernels, or more bytes where both are known."""
    assert EngineCost(*own).exceeds(EngineCost(*other)) is exceeds
