from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.vision import draw as module
from efficientface_deploy.vision.draw import draw_faces
from efficientface_deploy.vision.faces import Face

Box = tuple[float, float, float, float]


def drawn(image: Image.Image, *boxes: Box) -> np.ndarray:
    """Where a copy differs from the picture, which must stay as it was."""
    before = np.array(image)
    copy = draw_faces(image, [(Face(box), "Happiness 0.90", None) for box in boxes])
    np.testing.assert_array_equal(np.asarray(image), before)
    assert (copy.size, copy.mode) == (image.size, "RGB")
    return (np.asarray(copy) != before).any(axis=-1)


def inside(changed: np.ndarray, box: tuple[int, int, int, int], edge: int = 4) -> np.ndarray:
    """What of a box is within its frame."""
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(changed.shape[1] - 1, box[2]), min(changed.shape[0] - 1, box[3])
    return changed[top + edge : bottom - edge, left + edge : right - edge]


def test_box_has_its_edges_and_its_label_above():
    changed = drawn(Image.new("RGB", (400, 300)), (100, 50, 300, 250))
    assert changed[50, 100:301].all() and changed[50:251, 300].all()
    assert not inside(changed, (100, 50, 300, 250)).any()  # the face itself stays to be seen
    rows, columns = np.nonzero(changed)
    assert (rows.max(), columns.min(), columns.max()) == (250, 100, 300)
    assert 25 < rows.min() < 40 and changed[rows.min() : 50, 101:150].mean() > 0.5  # the label


def test_label_stays_above_a_box_that_moves_by_parts_of_a_pixel():
    image = Image.new("RGB", (400, 300))
    for part in np.arange(0, 1, 0.1):
        rows, _ = np.nonzero(drawn(image, (100.3, 100 + part, 200.7, 200)))
        assert rows.min() < 90


@pytest.mark.parametrize(
    "box",
    [
        (100, 0, 300, 250),  # no room above: below
        (0, 0, 200, 299),  # nor there: at its right
        (200, 0, 399, 299),  # at its left
        (350, 100, 399, 200),  # the label is wider than what is left to the right
        (-50, -50, 40, 40),
        (370, 270, 460, 340),
    ],
)
def test_label_is_beside_its_face_and_in_the_picture(box):
    changed = drawn(Image.new("RGB", (400, 300)), box)
    assert not inside(changed, box).any()
    assert changed.sum() > 1500  # box and label


def test_labels_hide_no_other_face_and_no_other_label():
    """Two rows of three faces: the labels of the second row would lie on the first."""
    boxes = [
        (left, top, left + 100, top + 120)
        for top, left in itertools.product((30, 152), (20, 150, 280))
    ]
    changed = drawn(Image.new("RGB", (400, 300)), *boxes)
    assert not any(inside(changed, box).any() for box in boxes)


def test_whole_picture_has_its_label_at_its_border():
    changed = drawn(Image.new("RGB", (200, 200)), (0, 0, 200, 200))
    assert not changed[40:160, 10:190].any() and changed[0].all()


def test_every_face_is_drawn():
    changed = drawn(Image.new("RGB", (400, 300)), (10, 40, 110, 110), (200, 100, 390, 290))
    assert changed[60, [10, 110, 200, 390]].tolist() == [True, True, False, False]
    assert changed[200, [10, 110, 200, 390]].tolist() == [False, False, True, True]


def colour_at(track: int | None, box: Box = (100, 100, 200, 200)) -> tuple[int, ...]:
    copy = draw_faces(Image.new("RGB", (300, 300)), [(Face(box), "Fear", track)])
    return tuple(copy.getpixel((100, 150)))


def test_a_track_keeps_its_colour():
    assert colour_at(3) == colour_at(3, (100, 120, 180, 190))
    assert len({colour_at(track) for track in range(1, 8)}) == 7
    assert colour_at(None) == colour_at(1) == colour_at(8) == (255, 220, 0)


@pytest.mark.parametrize("colour", module._COLOURS)
def test_letters_can_be_read_on_every_colour(colour):
    """WCAG's contrast of black on it, at least 7 to 1."""
    linear = (np.array(colour) / 255) ** 2.2
    assert (linear @ (0.2126, 0.7152, 0.0722) + 0.05) / 0.05 >= 7


def test_track_is_written():
    image = Image.new("RGB", (300, 300))
    face = Face((100, 100, 200, 200))
    with_track, without = (
        np.asarray(draw_faces(image, [(face, "Fear", track)])) for track in (8, None)
    )
    assert (with_track != without).any()


def test_no_face_changes_nothing():
    assert not drawn(Image.new("RGB", (40, 30))).any()


@pytest.mark.parametrize(
    "box", [(-50, -50, 20, 20), (0, 0, 40, 30), (-9, -9, 99, 99), (30, 2, 60, 9)]
)
def test_box_beyond_the_picture_is_cut_at_its_border(box):
    changed = drawn(Image.new("RGB", (40, 30)), box)
    left, top = max(0, box[0]), max(0, box[1])
    assert changed[top, left:].any() and changed[top:, left].any()


@pytest.mark.parametrize("box", [(100, 100, 120, 120), (-20, -20, -5, -5), (40, 0, 50, 9)])
def test_box_outside_is_not_drawn(box):
    assert not drawn(Image.new("RGB", (40, 30)), box).any()


@pytest.mark.parametrize("label", ["Überraschung", "驚き", "a" * 300, ""])
def test_any_label(label):
    image = Image.new("RGB", (60, 40))
    assert draw_faces(image, [(Face((5, 5, 50, 35)), f"{label} 1.00", 1)]).size == (60, 40)
