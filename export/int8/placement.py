"""INT8 where it costs a GPU no kernel: which layers, and what is done to the graph for them.

What TensorRT for RTX 1.7 makes of QuantizeLinear and DequantizeLinear, by its build logs:

- Rounding a tensor goes into the kernel that is generated for a Concat, a sum or a shuffle; behind
  a convolution or a pooling it takes a kernel of its own. So layers are chosen by what makes their
  input.
- Bias, ReLU and the way back to FP16 go into the end of an INT8 convolution where one scale serves
  all its weights; with a scale for each channel they take a kernel of their own. One scale need not
  be coarser: where a ReLU and a depthwise convolution follow, every channel can be made as wide as
  the widest, and the depthwise weights make up for it.
- Of a grouped convolution whose slices are rounded, bias and ReLU become a kernel of their own; of
  a dense one they do not.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from efficientface_export.graph.precision import FP16_MARGIN, FP16_MAX
from efficientface_export.int8.qdq import depthwise_behind, groups_of, quantisable_layers

# What a kernel is generated for in any case, into which the rounding of its result goes.
_GENERATED = ("Add", "Concat", "Mul", "Reshape", "Split", "Transpose")

# How many times finer a channel's weights may be rounded than alike: what FP16 loses by it stays
# far below a step of INT8.
_LARGEST_RATIO = 32.0

# A network with less of its weights in such layers is of another kind: all layers are taken then.
_SMALLEST_SHARE = 0.25


def lay_out_for_gpu(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Choose the layers of a network that INT8 is to take on a GPU, and prepare the graph for them.

    Args:
        graph: FP32; no weight of it is near what FP16 holds.

    Returns:
        A new graph that computes the same, and the layers that INT8 leaves out.
    """
    prepared = onnx.ModelProto()
    prepared.CopyFrom(graph)
    chosen = free_layers(graph)
    layers = quantisable_layers(prepared)
    if not chosen:
        return prepared, frozenset()
    weights = {weight.name: weight for weight in prepared.graph.initializer}
    for layer in layers:
        if layer.name in chosen:
            _share_scale(prepared, layer, weights)
        elif _is_sliced_and_read_whole(prepared, layer):
            _make_dense(layer, weights)
    return prepared, frozenset(layer.name for layer in layers) - chosen


def free_layers(graph: onnx.ModelProto) -> frozenset[str]:
    """The 1x1 convolutions that cost no kernel in INT8; none where they are few.

    Such a convolution alone reads its input, and a kernel is generated for that in any case.
    """
    makers = {output: node.op_type for node in graph.graph.node for output in node.output}
    read = [name for node in graph.graph.node for name in node.input]
    sizes = {weight.name: weight.dims for weight in graph.graph.initializer}
    layers = quantisable_layers(graph)
    chosen = [
        layer
        for layer in layers
        if makers.get(layer.input[0]) in _GENERATED
        and read.count(layer.input[0]) == 1
        and groups_of(layer) == 1
        and list(sizes[layer.input[1]][2:]) == [1, 1]
    ]
    total = sum(np.prod(sizes[layer.input[1]]) for layer in layers)
    held = sum(np.prod(sizes[layer.input[1]]) for layer in chosen)
    if held < _SMALLEST_SHARE * total:
        return frozenset()
    return frozenset(layer.name for layer in chosen)


def _share_scale(
    graph: onnx.ModelProto, layer: onnx.NodeProto, weights: dict[str, onnx.TensorProto]
) -> None:
    """Make all channels of a layer as wide as the widest, up to a ratio, if what follows allows it.

    A ReLU and a depthwise convolution follow: it multiplies by what its input was divided by. The
    layer's results become smaller, never larger, so that they fit FP16 as before.
    """
    depthwise = depthwise_behind(graph, layer)
    if depthwise is None:
        return
    weight, behind = (numpy_helper.to_array(weights[n.input[1]]) for n in (layer, depthwise))
    widest = np.abs(weight).max(axis=(1, 2, 3))  # (C,)
    room = FP16_MAX / FP16_MARGIN / max(np.abs(behind).max(), 1.0)
    ratio = min(_LARGEST_RATIO, room)
    factor = np.clip(widest * ratio / max(widest.max(), np.finfo(np.float32).tiny), 1.0, None)
    multiplied = np.repeat(factor, len(behind) // len(factor))
    _set(weights[layer.input[1]], weight / factor[:, None, None, None])
    for name in layer.input[2:]:
        _set(weights[name], numpy_helper.to_array(weights[name]) / factor)
    _set(weights[depthwise.input[1]], behind * multiplied[:, None, None, None])


def _is_sliced_and_read_whole(graph: onnx.ModelProto, layer: onnx.NodeProto) -> bool:
    """Whether slices of a grouped layer's result are read, and the whole by a convolution."""
    if groups_of(layer) == 1:
        return False
    followers = [node for node in graph.graph.node if layer.output[0] in node.input]
    if [node.op_type for node in followers] == ["Relu"]:
        followers = [node for node in graph.graph.node if followers[0].output[0] in node.input]
    return {node.op_type for node in followers} == {"Conv", "Slice"}


def _make_dense(layer: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> None:
    """One group, with zero weights between what were several."""
    groups = groups_of(layer)
    weight = numpy_helper.to_array(weights[layer.input[1]])  # (out, in / groups, kh, kw)
    out, width = len(weight) // groups, weight.shape[1]
    dense = np.zeros((len(weight), width * groups, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        rows = slice(group * out, (group + 1) * out)
        dense[rows, group * width : (group + 1) * width] = weight[rows]
    _set(weights[layer.input[1]], dense)
    layer.attribute.remove(next(a for a in layer.attribute if a.name == "group"))


def _set(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
