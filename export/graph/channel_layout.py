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
    time_of: Mapping[Channel, int],
    align: int,
    slices: bool,
    last: Sequence[Channel | None] | None = None,
) -> SourceLayout:
    """Order, padding and division of a source's channels.

    Channels lie in the order of their consumption. Readers of a slice take whole blocks, so that
    the channels of two readers may share one. Without slices two readers share a convolution only
    where the channels of both fit in one block.

    Args:
        channels: Of the source.
        time_of: When each is consumed.
        align: Groups and parts are whole blocks of so many channels.
        slices: One convolution makes them all, and readers take slices of it; else there is one
            convolution for each read.
        last: The channels that are consumed last, in the order in which they are wanted, in whole
            blocks that they share with no others; default: any order.
    """
    in_time = sorted(channels, key=time_of.__getitem__)
    runs: dict[int, Sequence[Channel | None]] = {
        time: list(run) for time, run in itertools.groupby(in_time, time_of.__getitem__)
    }
    if last is not None:
        runs[max(runs)] = last
    groups: list[list[Channel | None]] = [[]]
    parts = {}
    for time, run in runs.items():
        begins = not slices and len(groups[-1]) + len(run) > align
        if begins or run is last:
            groups[-1] = pad(groups[-1], align)
        if begins and groups[-1]:
            groups.append([])
        start, stop = len(groups[-1]), len(groups[-1]) + len(run)
        groups[-1] += run
        parts[time] = Part(len(groups) - 1, start // align * align, -(-stop // align) * align)
    return SourceLayout(tuple(tuple(pad(group, align)) for group in groups), parts)


def multiplied_order(
    lives: Lifetimes, multiplier: int, align: int, joint: bool = False
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
        joint: The output's part of sources 0 and 1 is one.

    Returns:
        Order of the input channels, with None for channels of zeros, and order of the residues;
        None where there are no such orders.
    """
    owners = [max(source, joint) for source, _ in lives.reads[lives.end]]
    inputs = range(len(owners) // multiplier)
    residues = sorted(range(multiplier), key=lambda m: (min(owners[m::multiplier]), m))
    divided = residues[0]
    order: list[int | None] = []
    for source in sorted(set(owners)):
        order += [c for c in inputs if owners[multiplier * c + divided] == source]
        order = pad(order, align)
    joined = [None if c is None else owners[multiplier * c + m] for m in residues for c in order]
    blocks = [set(joined[i : i + align]) - {None} for i in range(0, len(joined), align)]
    sequence = [source for block in blocks for source in block if source is not None]
    smallest = -(-len(inputs) // align) * align
    if len(order) > smallest or len(sequence) > len(blocks) or sequence != sorted(sequence):
        return None
    return tuple(order), tuple(residues)


def pad(channels: Sequence[Any], align: int) -> list[Any]:
    """Channels and zeros (None) up to a whole block."""
    return [*channels, *[None] * (-len(channels) % align)]


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
            depthwise ones. With ``merge_patches`` a Transpose stacks the quadrants, and one lays
            them out again.
        first_read_whole: Stages whose unit 1 reads all that unit 0 made, with zero weights for
            what it does not consume, instead of a part of it.
        slices: Each source is made by one convolution, of which readers take slices, instead of
            one for each reader.
        carry: Stages are laid out by :mod:`.carrying`; with none of the three before it.
    """

    align: int = 8
    merge_branches: bool = False
    merge_patches: bool = False
    split_multiplier: bool = False
    first_read_whole: tuple[str, ...] = ()
    slices: bool = False
    carry: bool = False

    def __post_init__(self) -> None:
        """Refuse what stages that carry channels do not have.

        Raises:
            ValueError: ``carry`` with another way to lay out stages.
        """
        if self.carry and (self.merge_branches or self.first_read_whole or self.slices):
            raise ValueError(f"expected carry or other ways to lay out stages, found {self}")


PROFILES = {
    # Narrow convolutions are cheap and slices expensive: they force a change of memory layout.
    "cpu": Profile(split_multiplier=True),
    # For blocks as wide as AVX-512's vectors: few nodes, and no block is mostly empty.
    "wide": Profile(align=16, merge_patches=True, split_multiplier=True, carry=True),
    # Kernels are expensive: one convolution for each source, and slices that one copy gathers.
    # Reading all in stage 4 as well would save one more kernel, for 1.31 times the multiply-adds.
    "gpu": Profile(
        align=4,
        merge_branches=True,
        merge_patches=True,
        first_read_whole=("stage2", "stage3"),
        slices=True,
    ),
}
