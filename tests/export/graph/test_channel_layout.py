from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from efficientface_deploy.models.efficientface import channel_shuffle
from efficientface_export.graph.channel_layout import (
    channel_lifetimes,
    layout_source,
    multiplied_order,
)


def shuffled(units: int, half: int) -> list[list[tuple[int, int]]]:
    """The same by the network's own shuffle, on channels that carry their names as numbers."""

    def source(number: int) -> torch.Tensor:
        return (number * 1000 + torch.arange(half)).view(1, half, 1, 1).double()

    live = channel_shuffle(torch.cat((source(0), source(1)), dim=1))
    reads = []
    for unit in range(1, units):
        kept, consumed = live.chunk(2, dim=1)
        reads.append(consumed)
        live = channel_shuffle(torch.cat((kept, source(unit + 1)), dim=1))
    return [[divmod(int(number), 1000) for number in read.flatten()] for read in (*reads, live)]


@given(units=st.integers(1, 9), half=st.integers(1, 40))
def test_reads_are_the_shuffles(units, half):
    lives = channel_lifetimes(units, half)
    assert [list(read) for read in lives.reads] == shuffled(units, half)
    assert lives.end == units - 1


@given(units=st.integers(1, 9), half=st.integers(1, 40))
def test_every_channel_is_consumed_once(units, half):
    lives = channel_lifetimes(units, half)
    channels = [channel for read in lives.reads for channel in read]
    assert len(channels) == len(set(channels)) == len(lives.time_of()) == (units + 1) * half
    for (source, _), time in lives.time_of().items():
        assert time >= source - 1  # not before it is made


@given(
    units=st.integers(1, 6),
    half=st.integers(1, 30),
    align=st.sampled_from([1, 4, 8]),
    slices=st.booleans(),
)
def test_layout_holds_every_channel_where_it_is_read(units, half, align, slices):
    lives = channel_lifetimes(units, half)
    time_of = lives.time_of()
    for source in range(units + 1):
        channels = [(source, index) for index in range(half)]
        layout = layout_source(channels, time_of, align, slices)
        made = [channel for group in layout.groups for channel in group if channel is not None]
        assert sorted(made) == channels
        assert all(len(group) % align == 0 for group in layout.groups)
        for time, part in layout.parts.items():
            assert part.start % align == part.stop % align == 0
            read = layout.groups[part.group][part.start : part.stop]
            assert {c for c in channels if time_of[c] == time} <= set(read)
        assert set(layout.parts) == {time_of[channel] for channel in channels}


@given(
    units=st.integers(1, 6),
    half=st.integers(1, 30),
    align=st.sampled_from([1, 4, 8]),
    slices=st.booleans(),
    data=st.data(),
)
def test_what_is_consumed_last_lies_as_wanted(units, half, align, slices, data):
    lives = channel_lifetimes(units, half)
    time_of = lives.time_of()
    for source in range(units + 1):
        channels = [(source, index) for index in range(half)]
        last = [channel for channel in channels if time_of[channel] == lives.end]
        if not last:
            continue
        wanted = data.draw(st.permutations([*last, *[None] * (-len(last) % align)]))
        layout = layout_source(channels, time_of, align, slices, wanted)
        part = layout.parts[lives.end]
        assert list(layout.groups[part.group][part.start : part.stop]) == wanted
        made = [channel for group in layout.groups for channel in group if channel is not None]
        assert sorted(made) == channels


@given(
    units=st.integers(1, 6),
    half=st.integers(1, 60),
    multiplier=st.sampled_from([1, 2, 4, 8]),
    align=st.sampled_from([1, 2, 4, 8]),
)
def test_orders_of_a_multiplier_are_those_of_the_stages_output(units, half, multiplier, align):
    assume(2 * half % multiplier == 0)
    lives = channel_lifetimes(units, half)
    orders = multiplied_order(lives, multiplier, align)
    if orders is None:
        return
    order, residues = orders
    inputs = [c for c in order if c is not None]
    assert sorted(inputs) == list(range(2 * half // multiplier))
    assert sorted(residues) == list(range(multiplier))
    joined = [None if c is None else multiplier * c + m for m in residues for c in order]
    sources = [None if j is None else lives.reads[lives.end][j][0] for j in joined]
    blocks = [set(sources[i : i + align]) - {None} for i in range(0, len(sources), align)]
    owners = [source for block in blocks for source in sorted(block)]
    assert all(len(block) <= 1 for block in blocks) and owners == sorted(owners)


@pytest.mark.parametrize(("align", "width"), [(1, 29), (4, 32), (8, 32)])
def test_stage_2_has_such_orders(align, width):
    orders = multiplied_order(channel_lifetimes(4, 58), 4, align)
    assert orders is not None and len(orders[0]) == width


def test_no_order_is_given_where_it_would_cost_channels():
    assert multiplied_order(channel_lifetimes(4, 58), 4, 16) is None


@pytest.mark.parametrize("source", [2, 3])
def test_one_convolution_for_a_source_or_one_for_each_reader(source):
    lives = channel_lifetimes(8, 116)
    channels = [(source, index) for index in range(116)]
    whole = layout_source(channels, lives.time_of(), 8, slices=True)
    split = layout_source(channels, lives.time_of(), 8, slices=False)
    assert len(whole.groups) == 1 and len(whole.groups[0]) == 120
    assert len(split.groups) > 3
    assert all(len(split.groups[p.group]) == p.stop - p.start for p in split.parts.values())
    assert 8 in {len(group) for group in split.groups}  # the last few channels share one block


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("align", [1, 8])
def test_blocks_are_no_more_than_one_for_each_run_needs(align, slices):
    """Against the prototype's layout: every run in blocks of its own, one convolution."""
    lives = channel_lifetimes(8, 116)
    time_of = lives.time_of()
    channels = [(2, index) for index in range(116)]
    counts = np.bincount([time_of[channel] for channel in channels])
    simple = sum(-(-int(count) // align) * align for count in counts)
    layout = layout_source(channels, time_of, align, slices)
    made = sum(map(len, layout.groups))
    read = sum(part.stop - part.start for part in layout.parts.values())
    assert made + read <= 2 * simple
