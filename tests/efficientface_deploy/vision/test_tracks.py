from __future__ import annotations

import itertools

import numpy as np
import pytest

from efficientface_deploy.vision import tracks as module
from efficientface_deploy.vision.faces import Face
from efficientface_deploy.vision.tracks import MEMORY, Tracker


def face(x: float, y: float = 100, width: float = 50, height: float = 60) -> Face:
    """A face by its centre."""
    return Face((x - width / 2, y - height / 2, x + width / 2, y + height / 2), 0.9)


def follow(frames, rate: float = 25) -> list[list[int]]:
    """The numbers of faces in frames that follow each other."""
    tracker = Tracker()
    return [tracker.update(faces, at / rate) for at, faces in enumerate(frames)]


def test_each_face_has_a_number_of_its_own():
    tracker = Tracker()
    assert tracker.update([face(100), face(300), face(200)], 0) == [1, 2, 3]
    assert tracker.update([face(201), face(99), face(302)], 0.04) == [3, 1, 2]
    assert tracker.update([], 0.08) == []
    assert tracker.update([face(300), face(600)], 0.12) == [2, 4]


@pytest.mark.parametrize("rate", [3, 10, 30])
@pytest.mark.parametrize("speed", [0, 50, 150])
def test_a_face_that_moves_and_shakes(rate, speed):
    """Its own width or three in a second; the detector's box shakes by a twentieth."""
    random = np.random.default_rng(0)
    places = 100 + speed * np.arange(3 * rate) / rate + random.normal(0, 2.5, 3 * rate)
    sizes = 50 * np.exp(random.normal(0, 0.05, 3 * rate))
    frames = [[face(x, width=size)] for x, size in zip(places, sizes, strict=True)]
    assert follow(frames, rate) == [[1]] * len(frames)


@pytest.mark.parametrize("missed", [1, 5, 25])
@pytest.mark.parametrize("speed", [0, 60])
def test_a_face_that_is_hidden_for_up_to_a_second(missed, speed):
    frames = [[face(100 + speed * at / 25)] for at in range(75)]
    frames[25 : 25 + missed] = [[]] * missed
    assert follow(frames) == [[1] if frame else [] for frame in frames]


@pytest.mark.parametrize("speed", [40, 100, 200])
def test_two_who_pass_each_other(speed):
    """Seen all the time, or, the one behind, not while it is hidden."""
    times = np.arange(75) / 25
    frames = [
        [face(200 + speed * (at - 1.5), 100), face(200 - speed * (at - 1.5), 115)] for at in times
    ]
    assert follow(frames) == [[1, 2]] * 75
    hidden = [one if abs(one[0].box[0] - one[1].box[0]) > 40 else one[:1] for one in frames]
    assert follow(hidden) == [[1, 2][: len(frame)] for frame in hidden]


def test_two_who_pass_each_other_behind_a_wall():
    """When they come out, each is where the other one went in."""
    frames = [[face(160 + 80 * at / 25), face(260 - 80 * at / 25)] for at in range(30)]
    frames[10:22] = [[]] * 12
    assert follow(frames) == [[1, 2]] * 10 + [[]] * 12 + [[1, 2]] * 8


def test_neighbours_keep_their_numbers_when_one_leaves():
    frames = [[face(100), face(170), face(240)]] * 10 + [[face(100), face(240)]] * 80
    numbers = follow(frames)
    assert numbers[9:11] == [[1, 2, 3], [1, 3]] and numbers[-1] == [1, 3]


@pytest.mark.parametrize(("seconds", "number"), [(MEMORY - 0.01, 1), (MEMORY + 0.01, 2)])
def test_who_comes_back_late_is_new(seconds, number):
    tracker = Tracker()
    tracker.update([face(100)], 0)
    assert tracker.update([face(100)], seconds) == [number]


@pytest.mark.parametrize(
    "other",
    [face(400), face(100, 400), face(100, width=150, height=180), face(100, width=12, height=12)],
)
def test_a_face_elsewhere_or_of_another_size_is_another(other):
    tracker = Tracker()
    tracker.update([face(100)], 0)
    assert tracker.update([other], 0.04) == [2]


def test_a_face_that_was_just_seen_goes_before_one_that_was_lost():
    tracker = Tracker()
    tracker.update([face(100), face(125, 101)], 0)
    for at in range(1, 26):
        tracker.update([face(125, 101)], at / 25)
    assert tracker.update([face(111, 100)], 26 / 25) == [2]  # though it is nearer to the first


def test_times_that_stand_still():
    tracker = Tracker()
    assert [tracker.update([face(100)], 5.0) for _ in range(5)] == [[1]] * 5


def test_a_crowd_in_any_order():
    random = np.random.default_rng(1)
    places = [(80 * x, 90 * y) for x, y in itertools.product(range(12), range(11))]
    tracker = Tracker()
    first = tracker.update([face(*place) for place in places], 0)
    numbers = dict(zip(places, first, strict=True))
    for at in range(1, 6):
        order = random.permutation(len(places))
        moved = [face(*(np.array(places[i]) + random.normal(0, 2, 2))) for i in order]
        found = tracker.update(moved, at / 25)
        assert found == [numbers[places[i]] for i in order]


def test_what_is_forgotten_takes_no_memory():
    tracker = Tracker()
    for at in range(200):
        tracker.update([face(1000 * (at % 7), 1000 * (at % 5))], at * 1.0)
    assert len(tracker._tracks) < 5 and module.MEMORY == MEMORY
