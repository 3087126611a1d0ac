from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy import VideoFrame, load
from efficientface_deploy.vision.steady import TIME_CONSTANT, Event, Events, SteadyLabels
from efficientface_deploy.vision.tracks import MEMORY

CLASSES = 4


def towards(label: int, probability: float = 0.9) -> np.ndarray:
    """Probabilities (C,) with one that is likely."""
    values = np.full(CLASSES, (1 - probability) / (CLASSES - 1), np.float32)
    values[label] = probability
    return values


def follow(steady: SteadyLabels, frames, rate: float) -> list[int]:
    return [steady.update(1, at / rate, values)[1] for at, values in enumerate(frames)]


def noisy(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """What a network might say, (N, C): right in four of five frames, and seldom sure."""
    random = np.random.default_rng(seed)
    logits = 1.2 * np.eye(CLASSES)[labels] + random.normal(0, 0.9, (len(labels), CLASSES))
    exponents = np.exp(1.5 * logits)
    return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)


def flips(labels) -> int:
    return int(np.count_nonzero(np.diff(labels)))


@pytest.mark.parametrize("rate", [10, 25, 60])
def test_flips_are_a_fifth_and_changes_come_within_a_third_of_a_second(rate):
    changes = np.random.default_rng(1).permutation(40) % CLASSES
    changes = changes[np.append(True, np.diff(changes) != 0)]
    truth = np.repeat(changes, 2 * rate)
    frames = noisy(truth)
    raw = frames.argmax(axis=1)
    steady = np.array(follow(SteadyLabels(), frames, rate))
    true = flips(truth)
    assert flips(raw) - true > 5 * true  # there is something to do
    assert flips(steady) - true <= (flips(raw) - true) / 5
    assert (steady == truth).mean() > (raw == truth).mean()
    starts = np.flatnonzero(np.diff(truth)) + 1
    delays = [np.flatnonzero(steady[at : at + 2 * rate] == truth[at]) for at in starts]
    assert np.mean([(found[0] if len(found) else 2 * rate) / rate for found in delays]) <= 0.3


@pytest.mark.parametrize("rate", [5, 25, 100])
def test_frame_rate_does_not_matter(rate):
    """After one time constant, a change has 1 - 1/e of the weight."""
    steady = SteadyLabels(1.0)
    follow(steady, [towards(0)] * (10 * rate), rate)
    for at in range(rate):
        smooth, _ = steady.update(1, 10 + (at + 1) / rate - 1 / rate, towards(1))
    ratio = np.log(smooth[1] / smooth[0]) / np.log(0.9 / 0.1 * 3)
    assert ratio == pytest.approx(1 - 2 * np.exp(-1), abs=0.02)


def test_first_frame_is_taken_as_it_is_and_the_second_counts_as_much():
    steady = SteadyLabels()
    smooth, label = steady.update(1, 0.0, towards(2))
    np.testing.assert_allclose(smooth, towards(2), atol=1e-6)
    assert label == 2
    smooth, _ = steady.update(1, 0.04, towards(1))
    assert 0.7 < smooth[1] / smooth[2] < 1.5
    assert smooth.sum() == pytest.approx(1) and smooth.dtype == np.float32


def test_label_is_held_until_another_is_clearly_better():
    steady = SteadyLabels(1e-6)  # no smoothing
    even, better, clearly = (np.array([1, e, 0.5, 0.5], np.float32) for e in (1.0, 2.0, 3.5))
    assert follow(steady, [towards(0), *(v / v.sum() for v in (even, better, clearly))], 25) == [
        *(0, 0, 0),
        1,
    ]


def test_faces_do_not_meet():
    steady = SteadyLabels()
    for at in range(20):
        assert steady.update(1, at / 25, towards(0))[1] == 0
        assert steady.update(2, at / 25, towards(3))[1] == 3


@pytest.mark.parametrize(("gap", "label"), [(MEMORY - 0.1, 1), (MEMORY + 0.1, 1), (0.04, 0)])
def test_after_a_gap_what_was_is_of_no_weight(gap, label):
    steady = SteadyLabels()
    follow(steady, [towards(0)] * 25, 25)
    assert steady.update(1, 0.96 + gap, towards(1, 0.6))[1] == label


def test_times_that_stand_still_or_go_back_are_survived():
    steady = SteadyLabels()
    follow(steady, [towards(0)] * 5, 25)
    for _ in range(2000):
        smooth, label = steady.update(1, 0.1, towards(1))
    assert label == 1 and np.isfinite(smooth).all()


def test_certain_probabilities():
    steady = SteadyLabels()
    certain = np.array([1, 0, 0, 0], np.float32)
    for values in (certain, certain[::-1], certain):
        smooth, _ = steady.update(1, 0.0, values)
        assert np.isfinite(smooth).all() and smooth.sum() == pytest.approx(1)


def test_a_sure_face_stays_sure():
    steady = SteadyLabels()
    sure = towards(2, 0.9999)
    for at in range(50):
        smooth, _ = steady.update(1, at / 25, sure)
    assert smooth[2] > 0.99


def test_nothing_is_kept_of_faces_that_have_gone():
    steady = SteadyLabels()
    for at in range(100):
        steady.update(at, at * 1.0, towards(0))
    assert len(steady._states) <= MEMORY + 1 and TIME_CONSTANT < MEMORY


# ---- events


def events_of(frames) -> list[Event]:
    events, found = Events(), []
    for seconds, labels in frames:
        found += events.update(seconds, labels)
    return found + events.end()


def test_events():
    frames = [
        (0.0, {1: "Neutral"}),
        (1.0, {1: "Neutral", 2: "Fear"}),
        (2.0, {1: "Happiness", 2: "Fear"}),
        (3.0, {2: "Fear"}),
        (3.5, {1: "Happiness"}),
        (6.0, {3: "Anger"}),
    ]
    assert events_of(frames) == [
        Event(1, "Neutral", 0.0, 1.0),
        Event(2, "Fear", 1.0, 3.0),
        Event(1, "Happiness", 2.0, 3.5),
        Event(3, "Anger", 6.0, 6.0),
    ]


def test_events_of_a_face_that_is_hidden():
    assert events_of([(0.0, {1: "Fear"}), (0.5, {}), (1.9, {1: "Fear"})]) == [
        Event(1, "Fear", 0.0, 1.9)
    ]
    assert events_of([(0.0, {1: "Fear"}), (0.5, {}), (2.1, {1: "Fear"})]) == [
        Event(1, "Fear", 0.0, 0.0),
        Event(1, "Fear", 2.1, 2.1),
    ]


def test_events_are_told_as_soon_as_they_end():
    events = Events()
    assert events.update(0.0, {1: "Fear"}) == []
    assert events.update(1.0, {1: "Anger"}) == [Event(1, "Fear", 0.0, 0.0)]
    assert events.end() == [Event(1, "Anger", 1.0, 1.0)] and events.end() == []


# ---- real faces

RATE = 25
CLASSES_SHOWN = 5  # neutral, happiness, surprise, sadness, anger: enough faces of each


def faces_of_ferplus(archive: zipfile.ZipFile, wanted: int) -> list[list[Image.Image]]:
    """FER+'s validation faces on whose class at least six of ten agree, by class."""
    folder = "ferplus/FER2013Valid/"
    faces: list[list[Image.Image]] = [[] for _ in range(CLASSES_SHOWN)]
    for name, _, *votes in csv.reader(io.StringIO(archive.read(f"{folder}label.csv").decode())):
        best = int(np.argmax(list(map(int, votes))))
        if best < CLASSES_SHOWN and int(votes[best]) >= 6 and len(faces[best]) < wanted:
            faces[best].append(Image.open(io.BytesIO(archive.read(folder + name))).convert("RGB"))
    return faces


def film(faces: list[list[Image.Image]], seconds: float) -> Iterator[tuple[np.ndarray, int]]:
    """Frames and the class of each: four faces of it take turns, in crops that shake."""
    random = np.random.default_rng(0)
    label, left, shake = -1, 0, np.zeros(3)
    for _ in range(round(seconds * RATE)):
        if left == 0:
            label = random.choice([one for one in range(CLASSES_SHOWN) if one != label])
            left = round(RATE * random.uniform(1.5, 4))
            shown = random.choice(len(faces[label]), 4, replace=False)
        if random.random() < 0.3:
            random.shuffle(shown)
        left -= 1
        shake = 0.7 * shake + random.normal(0, 0.025, 3)
        x, y, width = 48 * np.array([shake[0], shake[1], 1 + shake[2]])
        extent = (x, y, x + width, y + width)
        face = faces[label][shown[0]].transform((64, 64), Image.Transform.EXTENT, extent)
        noisy = np.asarray(face) * (1 + random.normal(0, 0.05)) + random.normal(0, 4, (64, 64, 3))
        yield noisy.clip(0, 255).astype(np.uint8), label


@pytest.mark.slow
def test_flips_of_real_faces_are_a_fifth_at_a_delay_below_a_third_of_a_second(shared):
    with zipfile.ZipFile(shared / "data" / "ferplus.zip") as archive:
        faces = faces_of_ferplus(archive, 200)
    frames, truth = zip(*film(faces, 120), strict=True)
    timed = (VideoFrame(frame, at / RATE) for at, frame in enumerate(frames))
    with load(threads=1) as predictor:
        labels = predictor.spec.labels
        found = [result.faces[0] for result in predictor.predict_stream(timed)]
    raw = np.array([labels.index(one.raw.label) for one in found])
    steady = np.array([labels.index(one.prediction.label) for one in found])
    true = flips(truth)
    assert flips(raw) - true > 200
    assert flips(steady) - true <= (flips(raw) - true) / 5
    assert (steady == truth).mean() > (raw == truth).mean()
    starts = np.flatnonzero(np.diff(truth)) + 1
    delays = []
    for at, end in zip(starts, [*starts[1:], len(truth)], strict=True):
        right = np.flatnonzero(steady[at:end] == truth[at])
        delays.append((right[0] if len(right) else end - at) / RATE)
    print(f"flips {flips(raw)}, steady {flips(steady)}, true {true}; delay {np.mean(delays):.2f} s")
    assert np.median(delays) <= 0.2 and np.mean(delays) <= 0.3
