"""ShuffleNetV2's stages without a shuffle: channels are made in the order of their readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientface_export.graph.carrying import CarriedLayout, Group, lay_out_carried
from efficientface_export.graph.channel_layout import (
    Channel,
    Lifetimes,
    Profile,
    channel_lifetimes,
    layout_source,
    pad,
)
from efficientface_export.graph.onnx_builder import (
    Array,
    GraphBuilder,
    Map,
    columns_in_order,
    rows_in_order,
)

Weights = Mapping[str, npt.NDArray[Any]]

BN_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default


class StageWriter(GraphBuilder):
    """Writes a network's stages from its weights.

    Args:
        weights: Its state dict as arrays, named as in the published checkpoints.
        profile: How to lay them out.
    """

    def __init__(self, weights: Weights, profile: Profile) -> None:
        super().__init__(profile.align)
        self.weights = {name: np.asarray(value) for name, value in weights.items()}
        self.profile = profile

    def plain(self, layer: str) -> tuple[Array, Array]:
        """Weight and bias of a layer."""
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

    def lifetimes(self, stage: str) -> Lifetimes:
        """Of the channels of a stage."""
        units = len({key.split(".")[1] for key in self.weights if key.startswith(stage + ".")})
        return channel_lifetimes(units, len(self.weights[f"{stage}.0.branch2.5.weight"]))

    def stage(self, name: str, x: Map, wanted: Sequence[int | None] = ()) -> Map:
        """A stage, which halves the side.

        Args:
            name: Of the stage.
            x: Its input.
            wanted: The order of its output's channels, None for a channel of zeros; default: any.
        """
        if self.profile.carry:
            return _CarryingStage(self, name, x, wanted).write()
        sources = _Sources(self, self.lifetimes(name), x.side // 2, wanted)
        self.first_unit(name, x, sources)
        for unit in range(1, sources.lives.end + 1):
            key = f"{name}.{unit}.branch2"
            branch = self.depthwise_branch(key, sources.read(unit - 1, f"{name}.{unit}"), 1)
            end = self.folded(f"{key}.5", f"{key}.6")
            sources.produce(f"{name}.{unit}", branch, sources.channels(unit + 1), *end)
        return sources.read(sources.lives.end, f"{name}.out")

    def first_unit(self, name: str, x: Map, sources: _Sources) -> None:
        """The stride-2 unit, whose two branches both see all of ``x``."""
        one, two = f"{name}.0.branch1", f"{name}.0.branch2"
        first, hidden = self.folded(f"{one}.0", f"{one}.1"), self.folded(f"{two}.3", f"{two}.4")
        ends = self.folded(f"{one}.2", f"{one}.3"), self.folded(f"{two}.5", f"{two}.6")
        if not self.profile.merge_branches:
            moved = self.depthwise(f"{one}.dw", x, *first, 2), self.depthwise_branch(two, x, 2)
            for source in (0, 1):
                channels = sources.channels(source)
                sources.produce(f"{name}.0.{source}", moved[source], channels, *ends[source])
            return
        # x passes the first 1x1 convolution unchanged: it is not negative, ReLU keeps it. The
        # channels inside are numbered anew: those of x, then the hidden ones of branch 2.
        inside, half = len(first[0]), sources.lives.half
        passed = pad([c for c in x.channels if c is not None], self.align)
        made = pad(range(inside, inside + len(hidden[0])), self.align)
        weight, bias = self.folded(f"{two}.0", f"{two}.1")  # (hidden, inside, 1, 1)
        identity = np.eye(inside, dtype=np.float32)[:, :, None, None]
        weight = np.concatenate((identity, weight))
        bias = np.concatenate((np.zeros(inside, np.float32), bias))
        wide = self.pointwise(f"{name}.0.in", x, weight, bias, relu=True, order=passed + made)
        kernels = [np.concatenate(pair) for pair in zip(first, hidden, strict=True)]
        joint = self.depthwise(f"{name}.0.dw", wide, kernels[0], kernels[1], 2)
        whole = name in self.profile.first_read_whole
        if len(passed) == len(made):
            sources.produce_pair(f"{name}.0", joint, ends, inside, whole)
            return
        # Each half of the output reads one part of this; the other weights are zero.
        weight = np.zeros((2 * half, inside + len(hidden[0]), 1, 1), np.float32)
        weight[:half, :inside] = ends[0][0]
        weight[half:, inside:] = ends[1][0]
        bias = np.concatenate((ends[0][1], ends[1][1]))
        channels = sources.channels(0) + sources.channels(1)
        sources.produce(f"{name}.0", joint, channels, weight, bias, whole)

    def depthwise_branch(self, key: str, x: Map, stride: int) -> Map:
        """1x1 convolution with ReLU, then the depthwise one: the first two of a branch's three."""
        hidden = self.pointwise(f"{key}.in", x, *self.folded(f"{key}.0", f"{key}.1"), relu=True)
        return self.depthwise(f"{key}.dw", hidden, *self.folded(f"{key}.3", f"{key}.4"), stride)


class _Sources:
    """The outputs of a stage's units, and what later units read of them."""

    def __init__(
        self, writer: StageWriter, lives: Lifetimes, side: int, wanted: Sequence[int | None]
    ) -> None:
        self.writer = writer
        self.lives = lives
        self.side = side
        # The stage's output in the order that is wanted; None is a channel of zeros.
        self.wanted = [None if j is None else lives.reads[lives.end][j] for j in wanted]
        self.time_of = lives.time_of()
        # For each time, the maps that are read; channels of others count as zeros.
        self.parts: dict[int, list[Map]] = {time: [] for time in range(len(lives.reads))}

    def channels(self, source: int) -> list[Channel]:
        """Those of a source, in the network's order."""
        return [(source, index) for index in range(self.lives.half)]

    def produce(
        self,
        name: str,
        x: Map,
        channels: Sequence[Channel],
        weight: Array,
        bias: Array,
        whole: bool = False,
    ) -> None:
        """Make a source by 1x1 convolutions with ReLU.

        Args:
            name: Of its nodes.
            x: What it is made of.
            channels: Its channels, in the order of the rows of ``weight``.
            weight: (len(channels), in, 1, 1).
            bias: (len(channels),).
            whole: Unit 1 reads all of it.
        """
        profile = self.writer.profile
        layout = layout_source(
            channels, self.time_of, profile.align, profile.slices, self.last(channels)
        )
        rows = {channel: index for index, channel in enumerate(channels)}
        for number, group in enumerate(layout.groups):
            made_by = f"{name}.out.{number}" if len(layout.groups) > 1 else f"{name}.out"
            order = [None if channel is None else rows[channel] for channel in group]
            made = self.writer.pointwise(made_by, x, weight, bias, relu=True, order=order)
            spans = {
                time: (part.start, part.stop)
                for time, part in layout.parts.items()
                if part.group == number
            }
            if whole and 0 in spans:
                spans[0] = 0, len(group)
            self.offer(made_by, made.name, group, spans)

    def produce_pair(
        self, name: str, x: Map, ends: Sequence[tuple[Array, Array]], inside: int, whole: bool
    ) -> None:
        """Make sources 0 and 1 by one grouped convolution, of the halves of ``x``.

        Args:
            name: Of its nodes.
            x: (N, 2 * width, H, W); source 0 is made of its first half.
            ends: Weight (H, in, 1, 1) and bias (H,) of each source.
            inside: How many numbers of channels come before those of the second half.
            whole: Unit 1 reads all of both.
        """
        layouts = [
            layout_source(self.channels(source), self.time_of, self.writer.align, slices=True)
            for source in (0, 1)
        ]
        # Grouped convolutions want both of equal width.
        out, width = max(len(layout.groups[0]) for layout in layouts), len(x.channels) // 2
        weights, biases = [], []
        joint: list[Channel | None] = []
        spans: list[dict[int, tuple[int, int]]] = []
        for source, (layout, (weight, bias)) in enumerate(zip(layouts, ends, strict=True)):
            group = pad(layout.groups[0], out)
            order = [None if channel is None else channel[1] for channel in group]
            half = x.channels[source * width : (source + 1) * width]
            columns = [None if c is None else c - source * inside for c in half]
            weights.append(columns_in_order(rows_in_order(weight, order), columns))
            biases.append(rows_in_order(bias, order))
            start = len(joint)
            spans.append(
                {time: (start + p.start, start + p.stop) for time, p in layout.parts.items()}
            )
            joint += group
        weight, bias = np.concatenate(weights), np.concatenate(biases)
        made = self.writer.conv(f"{name}.out", x.name, weight, bias, relu=True, group=2)
        for source in (0, 1):
            if whole:
                del spans[source][0]
            self.offer(f"{name}.out.{source}", made, joint, spans[source])
        if whole:
            self.offer(f"{name}.out", made, joint, {0: (0, len(joint))})

    def last(self, channels: Sequence[Channel]) -> list[Channel | None] | None:
        """What the end of the stage reads of a source, as it is wanted; None for any order."""
        align = self.writer.align
        places = [place for place, channel in enumerate(self.wanted) if channel in channels]
        if not places:
            return None
        return self.wanted[places[0] // align * align : -(-(places[-1] + 1) // align) * align]

    def offer(
        self,
        name: str,
        tensor: str,
        group: Sequence[Channel | None],
        spans: Mapping[int, tuple[int, int]],
    ) -> None:
        """Let later units read ranges of a tensor's channels.

        Args:
            name: Of the slice nodes.
            tensor: Its name.
            group: Its channels.
            spans: First channel and one after the last, for each time at which it is read.
        """
        slices = {(0, len(group)): tensor}
        for time, (start, stop) in spans.items():
            if (start, stop) not in slices:
                slices[start, stop] = self.writer.cut(
                    f"{name}.cut{len(slices) - 1}", tensor, (1,), (start,), (stop,)
                )
            position = {channel: index for index, channel in enumerate(self.lives.reads[time])}
            read = tuple(None if c is None else position.get(c) for c in group[start:stop])
            self.parts[time].append(Map(slices[start, stop], read, self.side))

    def read(self, time: int, name: str) -> Map:
        """What is consumed at a time, as one map whose channels are in the network's numbers."""
        parts = self.parts[time]
        names = [part.name for part in parts]
        joined = names[0]
        if len(parts) > 1:
            joined = self.writer.node("Concat", f"{name}.read", names, axis=1)
        return Map(joined, tuple(c for part in parts for c in part.channels), self.side)


class _CarryingStage:
    """A stage whose units pass channels on, see :mod:`.carrying`."""

    def __init__(
        self, writer: StageWriter, name: str, x: Map, wanted: Sequence[int | None]
    ) -> None:
        self.writer, self.name, self.x = writer, name, x
        self.lives = lives = writer.lifetimes(name)
        # Channels of the branch that padding leaves unused.
        spare = -len(writer.weights[f"{name}.1.branch2.0.weight"]) % writer.align
        self.wanted = [None if j is None else lives.reads[lives.end][j] for j in wanted]
        self.layout: CarriedLayout = lay_out_carried(lives, writer.align, spare, self.wanted)
        self.made: dict[Group, str] = {}

    def write(self) -> Map:
        self.first_unit()
        for time in range(self.lives.end):
            self.unit(time)
        return self.read(self.lives.end, f"{self.name}.out")

    def first_unit(self) -> None:
        """The stride-2 unit. A group of both sources is a sum: each lacks the other's channels."""
        writer, name = self.writer, f"{self.name}.0"
        one, two = f"{name}.branch1", f"{name}.branch2"
        first = writer.folded(f"{one}.0", f"{one}.1")
        moved = (
            writer.depthwise(f"{one}.dw", self.x, *first, 2),
            writer.depthwise_branch(two, self.x, 2),
        )
        ends = writer.folded(f"{one}.2", f"{one}.3"), writer.folded(f"{two}.5", f"{two}.6")
        for number, group in enumerate(self.groups_of(0)):
            out = f"{name}.out.{number}"
            sources = sorted({channel[0] for channel in group.channels if channel is not None})
            terms = []
            for source in sources:
                order = [c[1] if c is not None and c[0] == source else None for c in group.channels]
                part, alone = f"{out}.{source}", len(sources) == 1
                end = writer.pointwise(part, moved[source], *ends[source], relu=alone, order=order)
                terms.append(end.name)
            if len(terms) == 2:
                terms = [writer.node("Relu", f"{out}.relu", [writer.node("Add", out, terms)])]
            self.made[group] = terms[0]

    def unit(self, time: int) -> None:
        """The unit that reads at a time: its branch, with the carried channels behind its own."""
        writer, number = self.writer, time + 1
        name, key = f"{self.name}.{number}", f"{self.name}.{number}.branch2"
        carried = self.layout.carried[time]
        ones, centre = np.eye(len(carried))[:, :, None, None], np.zeros((len(carried), 1, 3, 3))
        centre[:, :, 1, 1] = 1

        def beside(folded: tuple[Array, Array], more: npt.NDArray[Any]) -> tuple[Array, Array]:
            return _beside(folded[0], more), np.pad(folded[1], (0, len(more)))

        weight, bias = beside(writer.folded(f"{key}.0", f"{key}.1"), ones)
        hidden = writer.pointwise(f"{key}.in", self.read(time, name), weight, bias, relu=True)
        weight, bias = writer.folded(f"{key}.3", f"{key}.4")
        weight, bias = np.concatenate((weight, centre)), np.pad(bias, (0, len(carried)))
        moved = writer.depthwise(f"{key}.dw", hidden, weight.astype(np.float32), bias, 1)
        weight, bias = beside(writer.folded(f"{key}.5", f"{key}.6"), ones)
        own = [(number + 1, index) for index in range(self.lives.half)]
        rows = {channel: row for row, channel in enumerate([*own, *carried])}
        for index, group in enumerate(self.groups_of(number)):
            order = [None if channel is None else rows[channel] for channel in group.channels]
            end = writer.pointwise(
                f"{name}.out.{index}", moved, weight, bias, relu=True, order=order
            )
            self.made[group] = end.name

    def groups_of(self, unit: int) -> list[Group]:
        return [group for group in self.layout.groups if group.unit == unit]

    def read(self, time: int, name: str) -> Map:
        """What is read at a time: the network's channels, then those that are carried."""
        groups = [self.layout.groups[index] for index in self.layout.reads[time]]
        numbers: dict[Channel | None, int] = {
            channel: number for number, channel in enumerate(self.lives.reads[time])
        }
        if time < self.lives.end:
            for channel in self.layout.carried[time]:
                numbers[channel] = len(numbers)
        elif self.wanted:
            place = {channel: place for place, channel in enumerate(self.wanted)}
            groups.sort(key=lambda group: min(place[c] for c in group.channels if c is not None))
        # A channel may be in two groups, old and carried: then it is read of the first.
        channels = [numbers.pop(c, None) for group in groups for c in group.channels]
        names = [self.made[group] for group in groups]
        joined = names[0]
        if len(names) > 1:
            joined = self.writer.node("Concat", f"{name}.read", names, axis=1)
        return Map(joined, tuple(channels), self.x.side // 2)


def _beside(weight: Array, other: npt.NDArray[Any]) -> Array:
    """Two layers (out, in, 1, 1) side by side: each sees its own inputs alone."""
    rows, columns = weight.shape[:2]
    joined = np.zeros((rows + len(other), columns + other.shape[1], 1, 1), np.float32)
    joined[:rows, :columns], joined[rows:, columns:] = weight, other
    return joined
