"""The life of every channel in a ShuffleNetV2 stage: who makes it, and who alone consumes it.

In a stage of R units, unit 0 gives two halves, a and y0, of H channels each. Every later unit k
takes the second half of the live channels as its branch's input, keeps the first half, and
interleaves it with its own output yk. So every channel is kept for a while and then consumed
exactly once: by the branch of one later unit, or by the end of the stage. A graph that knows when
can copy each channel at most once and needs no shuffle.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficientface_export.graph.onnx_builder import (
    Array,
    GraphBuilder,
    Map,
    columns_in_order,
    pad,
    renumbered,
    rows_in_order,
)

Channel = tuple[int, int]
"""(source, index): source 0 is a, source k + 1 is yk."""


@dataclasses.dataclass(frozen=True)
class Lifetimes:
    """Who consumes which channel of a stage.

    Attributes:
        half: H, channels of each source.
        reads: Channels that are consumed at time t, in the order in which the network's weights
            expect them: the branch of unit t + 1, and last the end of the stage.
    """

    half: int
    reads: tuple[tuple[Channel, ...], ...]

    @property
    def end(self) -> int:
        """The time at which the stage ends."""
        return len(self.reads) - 1

    def time_of(self) -> dict[Channel, int]:
        """When each channel is consumed."""
        return {channel: time for time, read in enumerate(self.reads) for channel in read}


def channel_lifetimes(units: int, half: int) -> Lifetimes:
    """Follow the channels of a stage through its shuffles.

    Args:
        units: R, at least 1.
        half: H.
    """
    live = _interleave(_source(0, half), _source(1, half))
    reads = []
    for unit in range(1, units):
        kept, consumed = live[:half], live[half:]
        reads.append(tuple(consumed))
        live = _interleave(kept, _source(unit + 1, half))
    return Lifetimes(half, (*reads, tuple(live)))


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a layout is judged by, in multiply-adds or their equivalent in time.

    Attributes:
        produce: Of one more channel of the source.
        read: Of one more channel in the input of a reader.
        copy: Of moving one channel into a reader's input.
        convolution: Of one more convolution that makes the source.
        cut: Of one slice node.
    """

    produce: float
    read: float
    copy: float
    convolution: float
    cut: float


@dataclasses.dataclass(frozen=True)
class Part:
    """A range of a group's channels, read at one time.

    Attributes:
        group: Which of the source's groups.
        start: First channel.
        stop: One after the last channel.
    """

    group: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SourceLayout:
    """In which order, and by how many convolutions, the channels of a source are made.

    Attributes:
        groups: The channels of each convolution's output; None is a channel of zeros.
        parts: What is read at each time; channels of others in it meet zero weights.
    """

    groups: tuple[tuple[Channel | None, ...], ...]
    parts: dict[int, Part]


def layout_source(
    channels: Sequence[Channel],
    time_of: dict[Channel, int],
    align: int,
    costs: Costs,
    last: Sequence[Channel | None] | None = None,
) -> SourceLayout:
    """The cheapest order, padding and division of a source's channels.

    Channels lie in the order of their consumption. Each next run of channels either begins at a
    multiple of ``align``, after channels of zeros, or shares a block with the one before; and the
    source is cut into one or several convolutions. All ways are tried: a source has at most as
    many runs as its stage has units.

    Args:
        channels: Of the source.
        time_of: When each is consumed.
        align: Groups and parts are whole blocks of so many channels.
        costs: What is minimised.
        last: The channels that are consumed last, in the order in which they are wanted, in whole
            blocks that they share with no others; default: any order.
    """
    in_time = sorted(channels, key=time_of.__getitem__)
    runs: dict[int, Sequence[Channel | None]] = {
        time: list(run) for time, run in itertools.groupby(in_time, time_of.__getitem__)
    }
    # Between two runs: share a block, start a new block, or start a new convolution.
    choices: list[tuple[str, ...]] = [("share", "align", "cut")] * (len(runs) - 1)
    if last is not None:
        runs[max(runs)] = last
        choices[-1:] = [("align", "cut")] * len(choices[-1:])
    best: tuple[float, SourceLayout] | None = None
    for breaks in itertools.product(*choices):
        layout = _lay_out(runs, breaks, align)
        cost = _cost(layout, costs)
        if best is None or cost < best[0]:
            best = cost, layout
    assert best is not None
    return best[1]


def multiplied_order(
    lives: Lifetimes, multiplier: int, align: int
) -> tuple[tuple[int | None, ...], tuple[int, ...]] | None:
    """Orders in which a channel-multiplying convolution gives the channels of a stage's output.

    The network's output channel ``multiplier * c + m`` of such a convolution comes from input
    channel c, and is added to the stage's. Written as ``multiplier`` depthwise convolutions over
    the same input, it gives all channels with m = m0, in the order of the input, then all with
    m = m1, and so on. The stage's output is a concatenation by source. EfficientFace's shuffles
    hand whole residues m to single sources but one, which they divide by c; so orders exist in
    which both are the same.

    Args:
        lives: Of the stage.
        multiplier: Output channels for each input channel; divides the stage's.
        align: Parts are whole blocks of so many channels.

    Returns:
        Order of the input channels, with None for channels of zeros, and order of the residues;
        None where there are no such orders.
    """
    owners = [source for source, _ in lives.reads[lives.end]]
    inputs = range(len(owners) // multiplier)
    residues = sorted(range(multiplier), key=lambda m: (min(owners[m::multiplier]), m))
    divided = residues[0]
    order: list[int | None] = []
    for source in sorted(set(owners)):
        order += [c for c in inputs if owners[multiplier * c + divided] == source]
        _pad(order, align)
    joined = [None if c is None else owners[multiplier * c + m] for m in residues for c in order]
    blocks = [set(joined[i : i + align]) - {None} for i in range(0, len(joined), align)]
    sequence = [source for block in blocks for source in block if source is not None]
    smallest = -(-len(inputs) // align) * align
    if len(order) > smallest or len(sequence) > len(blocks) or sequence != sorted(sequence):
        return None
    return tuple(order), tuple(residues)


def _lay_out(
    runs: Mapping[int, Sequence[Channel | None]], breaks: Sequence[str], align: int
) -> SourceLayout:
    groups: list[list[Channel | None]] = [[]]
    spans: dict[int, tuple[int, int, int]] = {}
    for (time, run), before in zip(runs.items(), ("share", *breaks), strict=True):
        if before != "share":
            _pad(groups[-1], align)
        if before == "cut":
            groups.append([])
        start = len(groups[-1])
        groups[-1] += run
        spans[time] = len(groups) - 1, start, len(groups[-1])
    _pad(groups[-1], align)
    parts = {
        time: Part(group, start // align * align, -(-stop // align) * align)
        for time, (group, start, stop) in spans.items()
    }
    return SourceLayout(tuple(map(tuple, groups)), parts)


def _cost(layout: SourceLayout, costs: Costs) -> float:
    total = 0.0
    for group in layout.groups:
        total += costs.convolution + costs.produce * len(group)
    for part in layout.parts.values():
        total += (costs.read + costs.copy) * (part.stop - part.start)
        if part.stop - part.start < len(layout.groups[part.group]):
            total += costs.cut
    return total


def _pad(group: list[Any], align: int) -> None:
    group += [None] * (-len(group) % align)


def _source(number: int, half: int) -> list[Channel]:
    return [(number, index) for index in range(half)]


def _interleave(first: Sequence[Channel], second: Sequence[Channel]) -> list[Channel]:
    return [channel for pair in zip(first, second, strict=True) for channel in pair]


@dataclasses.dataclass(frozen=True)
class Profile:
    """How a graph is laid out for one kind of machine.

    Attributes:
        align: Channels of a block.
        merge_branches: The two branches of a stride-2 unit as one, the picture passing the first
            convolution of the other branch unchanged.
        merge_patches: The four patch extractors as one, quadrants stacked in the channels.
        split_multiplier: The patch extractors' convolutions from 29 to 116 channels as four
            depthwise ones.
        first_read_whole: Stages whose unit 1 reads all that unit 0 made, with zero weights for
            what it does not consume, instead of a part of it.
        copy: Cost of moving one value, in multiply-adds.
        convolution: Cost of one more convolution, in multiply-adds.
        cut: Cost of one slice node, in multiply-adds.
    """

    align: int = 8
    merge_branches: bool = False
    merge_patches: bool = False
    split_multiplier: bool = False
    first_read_whole: tuple[str, ...] = ()
    copy: float = 8.0
    convolution: float = 300_000.0
    cut: float = 600_000.0

    def __post_init__(self) -> None:
        """Refuse what would cut the stacked quadrants apart again.

        Raises:
            ValueError: ``merge_patches`` with ``split_multiplier``.
        """
        if self.merge_patches and self.split_multiplier:
            raise ValueError("expected merge_patches or split_multiplier, found both")


PROFILES = {
    # Narrow convolutions are cheap and slices dear: they force a change of memory layout.
    "cpu": Profile(split_multiplier=True),
    # Kernels are dear: one convolution for each source, and slices that one copy gathers. Reading
    # all in stage 4 as well would save one more kernel, for 1.31 times the multiply-adds.
    "gpu": Profile(
        align=4,
        merge_branches=True,
        merge_patches=True,
        first_read_whole=("stage2", "stage3"),
        convolution=1e9,
        cut=0.0,
    ),
}


class _Sources:
    """The outputs of a stage's units, and what later units read of them."""

    def __init__(
        self,
        writer: GraphBuilder,
        profile: Profile,
        lives: Lifetimes,
        side: int,
        first_whole: bool,
        wanted: Sequence[int | None],
    ) -> None:
        self.writer = writer
        self.profile = profile
        self.lives = lives
        self.side = side
        self.first_whole = first_whole
        # The stage's output in the order that is wanted; None is a channel of zeros.
        self.wanted = [None if j is None else lives.reads[lives.end][j] for j in wanted]
        self.time_of = lives.time_of()
        # For each time, the maps that are read; channels of others count as zeros.
        self.parts: dict[int, list[Map]] = {time: [] for time in range(len(lives.reads))}

    def produce(
        self,
        name: str,
        x: Map,
        channels: Sequence[Channel],
        weight: Array,
        bias: Array,
        keys: Sequence[Any] | None = None,
    ) -> None:
        """Make a source by 1x1 convolutions with ReLU.

        Args:
            name: Of its nodes.
            x: What it is made of.
            channels: Its channels, in the order of the rows of ``weight``.
            weight: (len(channels), in, 1, 1).
            bias: (len(channels),).
            keys: Channels of ``x`` in the order of the columns, where both branches of unit 0 are
                merged in it; default: 0, 1, 2, ...
        """
        if keys is not None:
            x = renumbered(x, keys)
        layout = layout_source(
            channels,
            self.time_of,
            self.writer.align,
            self.costs(len(x.channels)),
            self.last(channels),
        )
        rows = {channel: index for index, channel in enumerate(channels)}
        for number, group in enumerate(layout.groups):
            suffix = f".{number}" if len(layout.groups) > 1 else ""
            order = [None if channel is None else rows[channel] for channel in group]
            made = self.writer.pointwise(
                f"{name}.out{suffix}", x, weight, bias, relu=True, order=order
            )
            spans = {
                time: (part.start, part.stop)
                for time, part in layout.parts.items()
                if part.group == number
            }
            if keys is not None and self.first_whole and 0 in spans:
                spans[0] = 0, len(group)
            self.offer(f"{name}.out{suffix}", made.name, group, spans)

    def produce_pair(
        self, name: str, x: Map, ends: Sequence[tuple[Array, Array]], width: int
    ) -> None:
        """Make sources 0 and 1 by one grouped convolution, of the halves of ``x``.

        Args:
            name: Of its nodes.
            x: (N, 2 * width, H, W); source 0 is made of its first half.
            ends: Weight (H, in, 1, 1) and bias (H,) of each source.
            width: Channels of each half of ``x``.
        """
        align = self.writer.align
        costs = dataclasses.replace(self.costs(width), convolution=1e18)
        channels = [[(source, index) for index in range(self.lives.half)] for source in (0, 1)]
        layouts = [layout_source(own, self.time_of, align, costs) for own in channels]
        # One convolution each, and, as grouped convolutions want it, of equal width.
        out = max(len(layout.groups[0]) for layout in layouts)
        weights, biases = [], []
        joint: list[Channel | None] = []
        spans: dict[int, list[tuple[int, int]]] = {}
        for source, (layout, (weight, bias)) in enumerate(zip(layouts, ends, strict=True)):
            group = pad(layout.groups[0], out)
            order = [None if channel is None else channel[1] for channel in group]
            half = x.channels[source * width : (source + 1) * width]
            keys = sorted(key for key in half if key is not None)
            numbers = {key: number for number, key in enumerate(keys)}
            columns = [None if key is None else numbers[key] for key in half]
            weights.append(columns_in_order(rows_in_order(weight, order), columns))
            biases.append(rows_in_order(bias, order))
            for time, part in layout.parts.items():
                spans.setdefault(time, []).append((len(joint) + part.start, len(joint) + part.stop))
            joint += group
        made = self.writer.conv(
            f"{name}.out",
            x.name,
            np.concatenate(weights),
            np.concatenate(biases),
            relu=True,
            group=2,
        )
        for half_of in (0, 1):
            chosen = {time: both[half_of] for time, both in spans.items()}
            if self.first_whole:
                del chosen[0]
            self.offer(f"{name}.out.{half_of}", made, tuple(joint), chosen)
        if self.first_whole:
            self.offer(f"{name}.out", made, tuple(joint), {0: (0, len(joint))})

    def last(self, channels: Sequence[Channel]) -> list[Channel | None] | None:
        """What the end of the stage reads of a source, as it is wanted; None for any order."""
        align = self.writer.align
        places = [place for place, channel in enumerate(self.wanted) if channel in channels]
        if not places:
            return None
        return self.wanted[places[0] // align * align : -(-(places[-1] + 1) // align) * align]

    def costs(self, width: int) -> Costs:
        """What a layout costs whose convolution reads so many channels."""
        profile, area = self.profile, self.side**2
        return Costs(
            produce=width * area,
            read=self.lives.half * area,
            copy=profile.copy * area,
            convolution=profile.convolution,
            cut=profile.cut,
        )

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
        slices: dict[tuple[int, int], str] = {}
        for time, (start, stop) in spans.items():
            source = tensor
            if (start, stop) != (0, len(group)):
                if (start, stop) not in slices:
                    slices[start, stop] = self.writer.cut(
                        f"{name}.cut{len(slices)}", tensor, (1,), (start,), (stop,)
                    )
                source = slices[start, stop]
            own = tuple(
                channel if channel is not None and self.time_of[channel] == time else None
                for channel in group[start:stop]
            )
            self.parts[time].append(Map(source, own, self.side))

    def read(self, time: int, name: str) -> Map:
        """What is consumed at a time, as one map whose channels are in the network's numbers."""
        parts = self.parts[time]
        if len(parts) == 1:
            joined = parts[0].name
        else:
            joined = self.writer.node("Concat", f"{name}.read", [p.name for p in parts], axis=1)
        position = {channel: index for index, channel in enumerate(self.lives.reads[time])}
        channels = tuple(
            None if channel is None else position[channel]
            for part in parts
            for channel in part.channels
        )
        return Map(joined, channels, self.side)
