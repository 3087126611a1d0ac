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
