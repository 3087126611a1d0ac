"""EfficientFace laid out for the machine: the same logits, by fewer and better shaped operations.

The graph is written from the weights, not traced: batch norm folded, no channel shuffle (every
channel is ordered by when it is consumed, see :mod:`.channel_layout`), channel counts padded to
whole blocks with zero weights, gates as 1x1 convolutions. It holds no Reshape, and one Transpose,
of the picture, unless the profile has the patch extractors' quadrants stacked by transposing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from efficientface_deploy.artifact import FLOAT_INPUT, OUTPUTS, UINT8_INPUT
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import LUMA, normalisation
from efficientface_export.graph.carrying import is_joint
from efficientface_export.graph.channel_layout import Profile, multiplied_order
from efficientface_export.graph.onnx_builder import Array, Map, columns_in_order, rows_in_order
from efficientface_export.graph.stages import StageWriter, Weights

QUADRANTS = 4
_HALVING: dict[str, Any] = {"strides": [2, 2], "pads": [1, 1, 1, 1]}


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


class _Writer(StageWriter):
    def __init__(self, weights: Weights, spec: ModelSpec, profile: Profile) -> None:
        super().__init__(weights, profile)
        self.spec = spec
        # Channel order of the stem, and of the local features among the outputs of stage 2.
        stem = len(self.weights["conv1.0.weight"])
        self.multiplier = len(self.weights["local.conv1_1.weight"]) // stem
        orders = None
        if profile.split_multiplier:
            lives = self.lifetimes("stage2")
            joint = profile.carry and is_joint(lives, lives.end, profile.align)
            orders = multiplied_order(lives, self.multiplier, profile.align, joint)
        self.orders_agree = orders is not None
        self.stem_order, self.residues = orders or (
            self.padded(stem),
            tuple(range(self.multiplier)),
        )

    def write(self, float_input: bool) -> onnx.ModelProto:
        side = self.spec.input_size
        stem = self.float_stem() if float_input else self.uint8_stem()
        pooled = self.node("MaxPool", "maxpool", [stem.name], kernel_shape=[3, 3], **_HALVING)
        x = Map(pooled, stem.channels, stem.side // 2)
        local = self.local(x)
        x = self.stage("stage2", x, self.local_order() if self.orders_agree else ())
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
        weight, bias = rows_in_order(weight, order), rows_in_order(bias, order)
        name = self.conv("conv1", picture.name, weight, bias, relu=True, **_HALVING)
        return Map(name, order, picture.side // 2)

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
        if self.profile.merge_patches and self.profile.split_multiplier:
            return self.transposed_patches(x)
        cuts = [(0, 0), (middle, 0), (0, middle), (middle, middle)]  # of quadrants 1 to 4
        patches = []
        for q, (top, left) in enumerate(cuts):
            name, stops = f"local.patch{q + 1}", (top + middle, left + middle)
            cut = self.cut(name, x.name, (2, 3), (top, left), stops)
            patches.append(Map(cut, x.channels, middle))
        if self.profile.merge_patches:
            patches = self.merged_patches(patches)
        else:
            patches = [self.patch(f"local.{q + 1}", (q,), patch) for q, patch in enumerate(patches)]
        names = [patch.name for patch in patches]
        halves = [
            self.node("Concat", "local.left", names[:2], axis=2),
            self.node("Concat", "local.right", names[2:], axis=2),
        ]
        joined = self.node("Concat", "local", halves, axis=3)
        return Map(joined, patches[0].channels, middle)

    def transposed_patches(self, x: Map) -> Map:
        """The same with the quadrants stacked in the channels, by transposing: few nodes."""
        count, middle = len(x.channels), x.side // 2
        rows, columns = (2, middle), (2, middle)
        cut = self.reshape("local.cut", x.name, count, *rows, *columns)
        turned = self.node("Transpose", "local.quadrants", [cut], perm=[0, 4, 2, 1, 3, 5])
        stacked = self.reshape("local.stack", turned, QUADRANTS * count, middle, middle)
        quadrants = tuple(range(QUADRANTS))
        made = self.patch("local", quadrants, Map(stacked, x.channels * QUADRANTS, middle))
        # Now (multiplier, right, bottom, channel) are one dimension.
        cut = self.reshape(
            "local.parts", made.name, self.multiplier, 2, 2, count, made.side, made.side
        )
        turned = self.node("Transpose", "local.joined", [cut], perm=[0, 1, 4, 3, 5, 2, 6])
        joined = self.reshape("local", turned, self.multiplier * count, middle, middle)
        return Map(joined, self.local_order(), middle)

    def reshape(self, name: str, x: str, *shape: int) -> str:
        """All dimensions but the batch's."""
        return self.node("Reshape", name, [x, self.integers(0, *shape)])

    def merged_patches(self, patches: list[Map]) -> list[Map]:
        names = [patch.name for patch in patches]
        joined = self.node("Concat", "local.patches", names, axis=1)
        stacked = Map(joined, patches[0].channels * QUADRANTS, patches[0].side)
        result = self.patch("local", tuple(range(QUADRANTS)), stacked)
        size = len(result.channels) // QUADRANTS
        return [
            Map(
                self.cut(f"local.out{q + 1}", result.name, (1,), (q * size,), ((q + 1) * size,)),
                result.channels[:size],
                result.side,
            )
            for q in range(QUADRANTS)
        ]

    def patch(self, name: str, quadrants: Sequence[int], x: Map) -> Map:
        """Both depthwise convolutions of one quadrant, or of several stacked in the channels."""
        inner = x.channels[: len(x.channels) // len(quadrants)]
        first = [self.folded(f"local.conv{q + 1}_1", f"local.bn{q + 1}_1") for q in quadrants]
        second = [self.folded(f"local.conv{q + 1}_2", f"local.bn{q + 1}_2") for q in quadrants]
        multiplier = self.multiplier

        def widen(name: str, channels: Sequence[int | None]) -> str:
            weight = np.concatenate([rows_in_order(w, channels) for w, _ in first])
            bias = np.concatenate([rows_in_order(b, channels) for _, b in first])
            return self.conv(
                name, x.name, weight, bias, relu=True, group=len(x.channels), **_HALVING
            )

        parts: list[tuple[int | None, ...]]
        if self.profile.split_multiplier:
            # Output channel multiplier * c + m comes from input channel c.
            channels, size = self.local_order(), len(inner)
            parts = [channels[m * size : (m + 1) * size] for m in range(multiplier)]
            names = [widen(f"{name}.1.{m}", part) for m, part in enumerate(parts)]
            joined = self.node("Concat", f"{name}.1", names, axis=1)
        else:
            parts = [
                tuple(
                    None if c is None else multiplier * c + m
                    for c in inner
                    for m in range(multiplier)
                )
            ]
            joined = widen(f"{name}.1", parts[0])
        weight = np.concatenate([rows_in_order(w, part) for part in parts for w, _ in second])
        bias = np.concatenate([rows_in_order(b, part) for part in parts for _, b in second])
        result = self.conv(
            f"{name}.2", joined, weight, bias, relu=True, pads=[1, 1, 1, 1], group=len(weight)
        )
        made = tuple(c for part in parts for c in part * len(quadrants))
        return Map(result, made, x.side // 2)

    def modulate(self, x: Map, local: Map) -> Map:
        """``x * sigmoid(channel gate * spatial gate) + local``, in the channel order of ``x``."""
        prefix = "modulator.channel_att.gate_c.gate_c_"
        pooled = Map(self.node("GlobalAveragePool", "gate.pool", [x.name]), x.channels, 1)
        weight, bias = self.folded(f"{prefix}fc_0", f"{prefix}bn_1")
        hidden = self.pointwise("gate.c1", pooled, weight[:, :, None, None], bias, relu=True)
        weight, bias = self.plain(f"{prefix}fc_final")
        weight = weight[:, :, None, None]
        channel = self.pointwise("gate.c2", hidden, weight, bias, order=x.channels)
        prefix = "modulator.spatial_att.gate_s.gate_s_"
        space = self.pointwise(
            "gate.s1", x, *self.folded(f"{prefix}conv_reduce0", f"{prefix}bn_reduce0"), relu=True
        )
        for index in range(2):
            weight, bias = self.folded(f"{prefix}conv_di_{index}", f"{prefix}bn_di_{index}")
            order = self.padded(len(weight))
            weight = columns_in_order(rows_in_order(weight, order), space.channels)
            bias = rows_in_order(bias, order)
            options: dict[str, Any] = {"pads": [4, 4, 4, 4], "dilations": [4, 4]}
            name = self.conv(f"gate.s{index + 2}", space.name, weight, bias, relu=True, **options)
            space = Map(name, order, x.side)
        spatial = self.pointwise("gate.s4", space, *self.plain(f"{prefix}conv_final"), order=(0,))
        product = self.node("Mul", "gate.product", [channel.name, spatial.name])
        gate = self.node("Sigmoid", "gate", [product])
        gated = self.node("Mul", "modulated", [x.name, gate])
        aligned = self.reorder(local, x.channels)
        return Map(self.node("Add", "features2", [gated, aligned.name]), x.channels, x.side)

    def reorder(self, x: Map, channels: tuple[int | None, ...]) -> Map:
        """Bring a map's channels into another order."""
        if x.channels == channels:
            return x
        zero = x.channels.index(None) if None in x.channels else 0
        index = [zero if c is None else x.channels.index(c) for c in channels]
        indices = self.array("local.order", np.array(index, dtype=np.int64))
        ordered = self.node("Gather", "local.ordered", [x.name, indices], axis=1)
        return Map(ordered, channels, x.side)
