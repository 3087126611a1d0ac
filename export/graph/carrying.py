"""A stage's channels in whole blocks: what shares a block and is read later is carried along.

In :mod:`.channel_layout` a reader takes from every earlier source the few channels that it
consumes. With wide blocks these are mostly empty: the oldest sources have a channel or two for each
reader. Here the late channels of a source share a block. A unit that reads the block for some of
them passes the others on, by identity weights (they come from a ReLU, and are not negative), in
channels of its branch that padding leaves unused, into unused channels of its own output. So a
reader finds old channels among newer ones, and fewer blocks hold the same channels.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from efficientface_export.graph.channel_layout import Channel, Lifetimes, pad


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that are made together and read together.

    Attributes:
        unit: Which unit of the stage makes them.
        channels: In whole blocks; None is a channel of zeros.
    """

    unit: int
    channels: tuple[Channel | None, ...]


@dataclasses.dataclass(frozen=True)
class CarriedLayout:
    """Who makes, reads and carries which channels of a stage.

    Attributes:
        groups: All that is made, in order of time. One of unit 0 may hold channels of both its
            sources.
        reads: At each time, the groups that are read.
        carried: At each time but the last, channels that the reading unit passes on.
    """

    groups: tuple[Group, ...]
    reads: tuple[tuple[int, ...], ...]
    carried: tuple[tuple[Channel, ...], ...]


def lay_out_carried(
    lives: Lifetimes, align: int, spare: int, wanted: Sequence[Channel | None] = ()
) -> CarriedLayout:
    """Decide for a stage what is made, read and carried.

    Args:
        lives: Of the stage.
        align: Groups are whole blocks of so many channels.
        spare: Unused channels within a unit's branch.
        wanted: The order of the stage's output, in which no block is of two groups; default: any.
    """
    time_of, end = lives.time_of(), lives.end
    groups: list[Group] = []
    place: dict[Channel, int] = {}  # the newest group that holds a channel

    def make(unit: int, runs: Iterable[Sequence[Channel]]) -> None:
        for run in _packed(runs, time_of, align, end if wanted else None):
            ordered = _as_wanted(run, wanted, align) if time_of[run[0]] == end else run
            place.update(dict.fromkeys(run, len(groups)))
            groups.append(Group(unit, tuple(pad(ordered, align))))

    def by_time(channels: Iterable[Channel]) -> list[list[Channel]]:
        ordered = sorted(channels, key=time_of.__getitem__)
        return [list(run) for _, run in itertools.groupby(ordered, time_of.__getitem__)]

    joint: list[Sequence[Channel]] = []
    for time in range(len(lives.reads)):
        halves = _halves(lives, time)
        if is_joint(lives, time, align):
            joint.append([*halves[0], *halves[1]])
        else:
            for half in filter(None, halves):
                make(0, [half])
    make(0, joint)
    reads, carried = [], []
    for time, consumed in enumerate(lives.reads):
        reads.append(tuple(sorted({place[channel] for channel in consumed})))
        if time == end:
            break
        made: list[Channel] = [(time + 2, index) for index in range(lives.half)]
        passed: list[Channel] = []
        blocks = _count_blocks(_packed(by_time(made), time_of, align), align)
        met = [c for group in reads[time] for c in groups[group].channels if c is not None]
        for channel in sorted(met, key=time_of.__getitem__):
            old = time_of[channel] <= time or place[channel] not in reads[time]
            if old or channel in passed or len(passed) == spare:
                continue
            runs = _packed(by_time([*made, *passed, channel]), time_of, align)
            if _count_blocks(runs, align) <= blocks:
                passed.append(channel)
        carried.append(tuple(passed))
        make(time + 1, by_time([*made, *passed]))
    return CarriedLayout(tuple(groups), tuple(reads), tuple(carried))


def is_joint(lives: Lifetimes, time: int, align: int) -> bool:
    """Whether what a reader takes of unit 0's two sources is made as one group.

    That costs both convolutions for each channel, so it pays where it saves half of the blocks.
    """
    one, two = halves = _halves(lives, time)
    apart, together = _count_blocks(halves, align), _count_blocks([[*one, *two]], align)
    return bool(one and two) and 2 * together <= apart


def _halves(lives: Lifetimes, time: int) -> list[list[Channel]]:
    return [[c for c in lives.reads[time] if c[0] == source] for source in (0, 1)]


def _packed(
    runs: Iterable[Sequence[Channel]],
    time_of: Mapping[Channel, int],
    align: int,
    alone: int | None = None,
) -> list[list[Channel]]:
    """Join neighbours that fit in one block; the run that is read at ``alone`` stays alone."""
    packed: list[list[Channel]] = []
    for run in runs:
        fits = packed and len(packed[-1]) + len(run) <= align
        if fits and time_of[run[0]] != alone:
            packed[-1] += run
        else:
            packed.append(list(run))
    return packed


def _count_blocks(runs: Iterable[Sequence[Channel]], align: int) -> int:
    return sum(-(-len(run) // align) for run in runs)


def _as_wanted(
    run: Sequence[Channel], wanted: Sequence[Channel | None], align: int
) -> Sequence[Channel | None]:
    if not wanted:
        return run
    places = [place for place, channel in enumerate(wanted) if channel in run]
    return wanted[places[0] // align * align : -(-(places[-1] + 1) // align) * align]
