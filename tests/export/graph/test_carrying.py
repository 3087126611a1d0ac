from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientface_export.graph.carrying import CarriedLayout, is_joint, lay_out_carried
from efficientface_export.graph.channel_layout import channel_lifetimes, multiplied_order


def held(layout: CarriedLayout, index: int) -> list[tuple[int, int]]:
    return [channel for channel in layout.groups[index].channels if channel is not None]


def read_width(layout: CarriedLayout, time: int) -> int:
    return sum(len(layout.groups[index].channels) for index in layout.reads[time])


@given(
    units=st.integers(1, 9),
    half=st.integers(1, 60),
    align=st.sampled_from([1, 4, 8, 16]),
    spare=st.integers(0, 16),
)
def test_every_channel_is_made_carried_and_read(units, half, align, spare):
    lives = channel_lifetimes(units, half)
    time_of = lives.time_of()
    layout = lay_out_carried(lives, align, spare)
    assert all(len(group.channels) % align == 0 for group in layout.groups)
    for unit in range(units):
        groups = [index for index, group in enumerate(layout.groups) if group.unit == unit]
        made = sorted(channel for index in groups for channel in held(layout, index))
        sources = (0, 1) if unit == 0 else (unit + 1,)
        own = [(source, index) for source in sources for index in range(half)]
        carried = layout.carried[unit - 1] if unit else ()
        assert made == sorted([*own, *carried])
    for time, consumed in enumerate(lives.reads):
        assert all(layout.groups[index].unit <= time for index in layout.reads[time])
        read = {channel for index in layout.reads[time] for channel in held(layout, index)}
        assert set(consumed) <= read
        if time < lives.end:
            carried = layout.carried[time]
            assert len(set(carried)) == len(carried) <= spare and set(carried) <= read
            assert all(time_of[channel] > time for channel in carried)
    assert len(layout.reads) == len(layout.carried) + 1 == units


@given(
    units=st.integers(1, 6),
    half=st.integers(1, 60),
    multiplier=st.sampled_from([1, 2, 4]),
    align=st.sampled_from([1, 4, 8, 16]),
    spare=st.integers(0, 16),
)
def test_the_output_lies_as_wanted(units, half, multiplier, align, spare):
    lives = channel_lifetimes(units, half)
    if 2 * half % multiplier:
        return
    joint = is_joint(lives, lives.end, align)
    orders = multiplied_order(lives, multiplier, align, joint)
    if orders is None:
        return
    numbers = [None if c is None else multiplier * c + m for m in orders[1] for c in orders[0]]
    wanted = [None if j is None else lives.reads[lives.end][j] for j in numbers]
    layout = lay_out_carried(lives, align, spare, wanted)
    groups = [layout.groups[index].channels for index in layout.reads[lives.end]]
    groups.sort(key=lambda group: min(wanted.index(c) for c in group if c is not None))
    assert [channel for group in groups for channel in group] == wanted


@pytest.mark.parametrize(
    ("units", "half", "spare", "widths"),
    [
        (4, 58, 6, [64, 64, 64, 128]),
        (8, 116, 12, [128, 128, 128, 128, 144, 144, 128, 240]),
        # What carrying saves: each of the older sources would cost a block of its own.
        (8, 116, 0, [128, 128, 128, 128, 144, 160, 176, 304]),
    ],
)
def test_what_efficientfaces_stages_read(units, half, spare, widths):
    layout = lay_out_carried(channel_lifetimes(units, half), 16, spare)
    assert [read_width(layout, time) for time in range(units)] == widths


def test_both_sources_share_a_block_where_each_half_fills_one():
    lives = channel_lifetimes(8, 116)  # of each source 58, 29, 15, 7, ... channels are read
    assert [is_joint(lives, time, 16) for time in range(5)] == [False, False, False, True, True]
    layout = lay_out_carried(lives, 16, 12)
    (shared,) = [i for i in layout.reads[3] if {source for source, _ in held(layout, i)} == {0, 1}]
    assert len(layout.groups[shared].channels) == 16


def test_stage_2_agrees_with_the_local_features_at_16_channels_too():
    lives = channel_lifetimes(4, 58)
    assert multiplied_order(lives, 4, 16) is None
    orders = multiplied_order(lives, 4, 16, joint=is_joint(lives, lives.end, 16))
    assert orders is not None and len(orders[0]) == 32
