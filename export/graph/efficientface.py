"""EfficientFace laid out for the machine: the same logits, by fewer and better shaped operations.

The graph is written from the weights, not traced: batch norm folded, no channel shuffle (every
channel is ordered by when it is consumed, see :mod:`.channel_layout`), channel counts padded to
whole blocks with zero weights, gates as 1x1 convolutions. It holds no Reshape, and one Transpose,
of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from efficientface_deploy.artifact import FLOAT_INPUT, OUTPUTS, UINT8_INPUT
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import LUMA, normalisation
from efficientface_export.graph.channel_layout import (
    Lifetimes,
    Profile,
    _Sources,
    channel_lifetimes,
    multiplied_order,
)
from efficientface_export.graph.onnx_builder import (
    Array,
    GraphBuilder,
    Map,
    columns_in_order,
    pad,
    rows_in_order,
)

Weights = Mapping[str, npt.NDArray[Any]]

BN_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default
STAGES = ("stage2", "stage3", "stage4")
QUADRANTS = 4


def deploy_graph(
    weights: Weights, spec: ModelSpec, profile: Profile, *, float_input: bool = False
) -> onnx.ModelProto:
    """Write the graph of a trained EfficientFace.

    Args:
        weights: Its state dict as arrays, named as in the published checkpoints.
        spec: Its spec.
        profile: How to lay it out.
        float_input: ``input``, float32 (N, 3, S, S), normalised, instead of ``image``, uint8
            (N, S, S, 3), RGB.

    Returns:
        FP32 ONNX with outputs ``logits`` and ``probabilities``.
    """
    return _Writer(weights, spec, profile).write(float_input)


class _Writer(GraphBuilder):
    def __init__(self, weights: Weights, spec: ModelSpec, profile: Profile) -> None:
        super().__init__(profile.align)
        self.weights = {name: np.asarray(value) for name, value in weights.items()}
        self.spec = spec
        self.profile = profile
        # Channel order of the stem, and of the local features among the outputs of stage 2.
        stem = len(self.weights["conv1.0.weight"])
        self.multiplier = len(self.weights["local.conv1_1.weight"]) // stem
        orders = None
        if profile.split_multiplier:
            orders = multiplied_order(self.lifetimes("stage2"), self.multiplier, profile.align)
        self.orders_agree = orders is not None
        self.stem_order, self.residues = orders or (
            self.padded(stem),
            tuple(range(self.multiplier)),
        )

    def write(self, float_input: bool) -> onnx.ModelProto:
        side = self.spec.input_size
        stem = self.float_stem() if float_input else self.uint8_stem()
        x = Map(
            self.node(
                "MaxPool",
                "maxpool",
                [stem.name],
                kernel_shape=[3, 3],
                strides=[2, 2],
                pads=[1, 1, 1, 1],
            ),
            stem.channels,
            stem.side // 2,
        )
        local = self.local(x)
        x = self.stage("stage2", x)
        x = self.modulate(x, local)
        x = self.stage("stage3", x)
        x = self.stage("stage4", x)
        x = self.pointwise("conv5", x, *self.folded("conv5.0", "conv5.1"), relu=True)
        pooled = self.node("GlobalAveragePool", "pool", [x.name])  # (N, 1024, 1, 1)
        squeezed = self.node("Squeeze", "features", [pooled, self.integers(2, 3)])  # (N, 1024)
        head = self.array("fc.weight", self.weights["fc.weight"])
        bias = self.array("fc.bias", self.weights["fc.bias"])
        logits, probabilities = OUTPUTS
        self.nodes.append(
            helper.make_node("Gemm", [squeezed, head, bias], [logits], "fc", transB=1)
        )
        self.nodes.append(helper.make_node("Softmax", [logits], [probabilities], "softmax", axis=1))
        return self.model(float_input, side, self.spec.num_classes)

    # ---- Picture and stem --------------------------------------------------------------------

    def float_stem(self) -> Map:
        picture = Map(FLOAT_INPUT, (0, 1, 2), self.spec.input_size)
        return self.stem(picture, self.folded("conv1.0", "conv1.1"))

    def uint8_stem(self) -> Map:
        """The mean is subtracted before the convolution, whose zero padding lies at the mean."""
        side = self.spec.input_size
        scale, offset = normalisation(self.spec)  # (3,) each
        weight, bias = self.folded("conv1.0", "conv1.1")  # (29, 3, 3, 3), (29,)
        pixels = self.node("Cast", "pixels", [UINT8_INPUT], to=TensorProto.FLOAT)
        planes = self.node("Transpose", "planes", [pixels], perm=[0, 3, 1, 2])  # (N, 3, S, S)
        weight = weight * scale[:, None, None]
        mean = (-offset / scale).astype(np.float32)  # (3,), 0 to 255
        if self.spec.colour == "grey":
            luma = np.array(LUMA, dtype=np.float32)
            if np.ptp(mean) == 0:
                # luminance - mean = sum of luma * (pixel - mean), since luma sums to one.
                weight = weight.sum(axis=1, keepdims=True) * luma[:, None, None]
            else:
                kernel = self.array("luma", luma.reshape(1, 3, 1, 1))
                planes = self.node("Conv", "luminance", [planes, kernel])  # (N, 1, S, S)
        shift = self.array("mean", mean.reshape(1, 3, 1, 1))
        centred = self.node("Sub", "centred", [planes, shift])  # (N, 3, S, S)
        return self.stem(Map(centred, (0, 1, 2), side), (weight, bias))

    def stem(self, picture: Map, folded: tuple[Array, Array]) -> Map:
        weight, bias = folded
        order = self.stem_order
        name = self.conv(
            "conv1",
            picture.name,
            rows_in_order(weight, order),
            rows_in_order(bias, order),
            relu=True,
            strides=[2, 2],
            pads=[1, 1, 1, 1],
        )
        return Map(name, order, picture.side // 2)

    # ---- Stages ------------------------------------------------------------------------------

    def stage(self, name: str, x: Map) -> Map:
        lives = self.lifetimes(name)
        half = lives.half
        wanted = self.local_order() if name == "stage2" and self.orders_agree else ()
        whole = name in self.profile.first_read_whole
        sources = _Sources(self, self.profile, lives, x.side // 2, whole, wanted)
        self.first_unit(name, x, sources)
        for unit in range(1, lives.end + 1):
            key = f"{name}.{unit}.branch2"
            branch = self.depthwise_branch(key, sources.read(unit - 1, f"{name}.{unit}"), 1)
            weight, bias = self.folded(f"{key}.5", f"{key}.6")
            channels = [(unit + 1, index) for index in range(half)]
            sources.produce(f"{name}.{unit}", branch, channels, weight, bias)
        return sources.read(lives.end, f"{name}.out")

    def lifetimes(self, stage: str) -> Lifetimes:
        """Of the channels of a stage."""
        units = len({key.split(".")[1] for key in self.weights if key.startswith(stage + ".")})
        return channel_lifetimes(units, len(self.weights[f"{stage}.0.branch2.5.weight"]))

    def first_unit(self, name: str, x: Map, sources: _Sources) -> None:
        """The stride-2 unit, whose two branches both see all of ``x``."""
        one, two = f"{name}.0.branch1", f"{name}.0.branch2"
        half = sources.lives.half
        channels = {source: [(source, index) for index in range(half)] for source in (0, 1)}
        ends = {0: self.folded(f"{one}.2", f"{one}.3"), 1: self.folded(f"{two}.5", f"{two}.6")}
        if not self.profile.merge_branches:
            weight, bias = self.folded(f"{one}.0", f"{one}.1")
            for source, branch in (
                (0, self.depthwise(f"{one}.dw", x, weight, bias, 2)),
                (1, self.depthwise_branch(two, x, 2)),
            ):
                sources.produce(f"{name}.0.{source}", branch, channels[source], *ends[source])
            return
        # x passes the first 1x1 convolution unchanged: it is not negative, ReLU keeps it.
        weight, bias = self.folded(f"{two}.0", f"{two}.1")  # (half, in, 1, 1)
        inside = [("x", c) for c in x.channels if c is not None]
        hidden = [("h", index) for index in range(len(weight))]
        passed, made = pad(inside, self.profile.align), pad(hidden, self.profile.align)
        order = passed + made
        columns = len(self.weights[f"{one}.0.weight"])
        identity = np.eye(columns, dtype=np.float32)[:, :, None, None]
        rows = {("h", i): (weight[i], bias[i]) for i in range(len(weight))}
        rows |= {("x", c): (identity[c], np.float32(0)) for c in x.channels if c is not None}
        wide = self.pointwise_rows(f"{name}.0.in", x, rows, order)
        first = self.folded(f"{one}.0", f"{one}.1")
        second = self.folded(f"{two}.3", f"{two}.4")
        kernels = {("x", c): (first[0][c], first[1][c]) for c in x.channels if c is not None}
        kernels |= {("h", i): (second[0][i], second[1][i]) for i in range(len(second[0]))}
        moved = self.depthwise_rows(f"{name}.0.dw", wide, kernels, 2)
        if len(passed) == len(made):
            sources.produce_pair(f"{name}.0", moved, (ends[0], ends[1]), len(passed))
            return
        # Each half of the output reads one part of this; the other weights are zero.
        keys = [("x", c) for c in range(columns)] + [("h", i) for i in range(len(second[0]))]
        joint = np.zeros((2 * half, len(keys), 1, 1), np.float32)
        joint[:half, :columns] = ends[0][0]
        joint[half:, columns:] = ends[1][0]
        bias = np.concatenate((ends[0][1], ends[1][1]))
        sources.produce(f"{name}.0", moved, channels[0] + channels[1], joint, bias, keys)

    def depthwise_branch(self, key: str, x: Map, stride: int) -> Map:
        """1x1 convolution with ReLU, then the depthwise one: the first two of a branch's three."""
        hidden = self.pointwise(f"{key}.in", x, *self.folded(f"{key}.0", f"{key}.1"), relu=True)
        return self.depthwise(f"{key}.dw", hidden, *self.folded(f"{key}.3", f"{key}.4"), stride)

    # ---- Local feature extractor and modulator -------------------------------------------------

    def local_order(self) -> tuple[int | None, ...]:
        """The local features' channels, as several depthwise convolutions give them."""
        return tuple(
            None if c is None else self.multiplier * c + m
            for m in self.residues
            for c in self.stem_order
        )

    def local(self, x: Map) -> Map:
        """The four quadrants, each through depthwise convolutions of its own, joined again."""
        middle = x.side // 2
        cuts = [(0, 0), (middle, 0), (0, middle), (middle, middle)]  # of quadrants 1 to 4
        patches = [
            Map(
                self.cut(
                    f"local.patch{q + 1}",
                    x.name,
                    (2, 3),
                    (top, left),
                    (top + middle, left + middle),
                ),
                x.channels,
                middle,
            )
            for q, (top, left) in enumerate(cuts)
        ]
        if self.profile.merge_patches:
            patches = self.merged_patches(patches)
        else:
            patches = [self.patch(f"local.{q + 1}", (q,), patch) for q, patch in enumerate(patches)]
        names = [patch.name for patch in patches]
        left = self.node("Concat", "local.left", names[:2], axis=2)
        right = self.node("Concat", "local.right", names[2:], axis=2)
        joined = self.node("Concat", "local", [left, right], axis=3)
        return Map(joined, patches[0].channels, middle)

    def merged_patches(self, patches: list[Map]) -> list[Map]:
        names = [patch.name for patch in patches]
        stacked = Map(
            self.node("Concat", "local.patches", names, axis=1),
            patches[0].channels * QUADRANTS,
            patches[0].side,
        )
        result = self.patch("local", tuple(range(QUADRANTS)), stacked)
        channels = result.channels[: len(result.channels) // QUADRANTS]
        size = len(channels)
        return [
            Map(
                self.cut(f"local.out{q + 1}", result.name, (1,), (q * size,), ((q + 1) * size,)),
                channels,
                result.side,
            )
            for q in range(QUADRANTS)
        ]

    def patch(self, name: str, quadrants: Sequence[int], x: Map) -> Map:
        """Both depthwise convolutions of one quadrant, or of several stacked in the channels."""
        inner = x.channels[: len(x.channels) // len(quadrants)]
        first = [self.folded(f"local.conv{q + 1}_1", f"local.bn{q + 1}_1") for q in quadrants]
        second = [self.folded(f"local.conv{q + 1}_2", f"local.bn{q + 1}_2") for q in quadrants]
        multiplier, side = self.multiplier, x.side // 2
        if self.profile.split_multiplier:
            # Output channel multiplier * c + m comes from input channel c.
            channels = self.local_order()
            parts = []
            for m in range(multiplier):
                order = channels[m * len(inner) : (m + 1) * len(inner)]
                weight = np.concatenate([rows_in_order(w, order) for w, _ in first])
                bias = np.concatenate([rows_in_order(b, order) for _, b in first])
                parts.append(
                    self.conv(
                        f"{name}.1.{m}",
                        x.name,
                        weight,
                        bias,
                        relu=True,
                        strides=[2, 2],
                        pads=[1, 1, 1, 1],
                        group=len(weight),
                    )
                )
            joined = self.node("Concat", f"{name}.1", parts, axis=1)
        else:
            channels = tuple(
                None if c is None else multiplier * c + m for c in inner for m in range(multiplier)
            )
            weight = np.concatenate([rows_in_order(w, channels) for w, _ in first])
            bias = np.concatenate([rows_in_order(b, channels) for _, b in first])
            joined = self.conv(
                f"{name}.1",
                x.name,
                weight,
                bias,
                relu=True,
                strides=[2, 2],
                pads=[1, 1, 1, 1],
                group=len(x.channels),
            )
        weight = np.concatenate([rows_in_order(w, channels) for w, _ in second])
        bias = np.concatenate([rows_in_order(b, channels) for _, b in second])
        result = self.conv(
            f"{name}.2", joined, weight, bias, relu=True, pads=[1, 1, 1, 1], group=len(weight)
        )
        return Map(result, channels * len(quadrants), side)

    def modulate(self, x: Map, local: Map) -> Map:
        """``x * sigmoid(channel gate * spatial gate) + local``, in the channel order of ``x``."""
        prefix = "modulator.channel_att.gate_c.gate_c_"
        pooled = Map(self.node("GlobalAveragePool", "gate.pool", [x.name]), x.channels, 1)
        weight, bias = self.folded(f"{prefix}fc_0", f"{prefix}bn_1")
        hidden = self.pointwise("gate.c1", pooled, weight[:, :, None, None], bias, relu=True)
        weight, bias = self.plain(f"{prefix}fc_final")
        channel = self.pointwise(
            "gate.c2", hidden, weight[:, :, None, None], bias, order=x.channels
        )
        prefix = "modulator.spatial_att.gate_s.gate_s_"
        space = self.pointwise(
            "gate.s1", x, *self.folded(f"{prefix}conv_reduce0", f"{prefix}bn_reduce0"), relu=True
        )
        for index in range(2):
            weight, bias = self.folded(f"{prefix}conv_di_{index}", f"{prefix}bn_di_{index}")
            order = self.padded(len(weight))
            weight = columns_in_order(rows_in_order(weight, order), space.channels)
            name = self.conv(
                f"gate.s{index + 2}",
                space.name,
                weight,
                rows_in_order(bias, order),
                relu=True,
                pads=[4, 4, 4, 4],
                dilations=[4, 4],
            )
            space = Map(name, order, x.side)
        spatial = self.pointwise("gate.s4", space, *self.plain(f"{prefix}conv_final"), order=(0,))
        product = self.node("Mul", "gate.product", [channel.name, spatial.name])
        gate = self.node("Sigmoid", "gate", [product])
        gated = self.node("Mul", "modulated", [x.name, gate])
        aligned = self.reorder(local, x.channels)
        return Map(self.node("Add", "features2", [gated, aligned.name]), x.channels, x.side)

    def reorder(self, x: Map, channels: tuple[Any, ...]) -> Map:
        """Bring a map's channels into another order."""
        if x.channels == channels:
            return x
        zero = x.channels.index(None) if None in x.channels else 0
        index = [zero if c is None else x.channels.index(c) for c in channels]
        indices = self.array("local.order", np.array(index, dtype=np.int64))
        return Map(
            self.node("Gather", "local.ordered", [x.name, indices], axis=1), channels, x.side
        )

    # ---- Weights -------------------------------------------------------------------------------

    def plain(self, layer: str) -> tuple[Array, Array]:
        return self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]

    def folded(self, layer: str, norm: str) -> tuple[Array, Array]:
        """Weight and bias of a layer with the batch norm after it."""
        weight = self.weights[f"{layer}.weight"].astype(np.float64)
        bias = self.weights.get(f"{layer}.bias", np.zeros(len(weight)))
        scale = self.weights[f"{norm}.weight"] / np.sqrt(
            self.weights[f"{norm}.running_var"].astype(np.float64) + BN_EPSILON
        )
        shift = self.weights[f"{norm}.bias"] + (bias - self.weights[f"{norm}.running_mean"]) * scale
        shaped = scale.reshape(-1, *(1,) * (weight.ndim - 1))
        return (weight * shaped).astype(np.float32), shift.astype(np.float32)
