from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.vision.draw import draw_faces
from efficientface_deploy.vision.faces import Face


def drawn(image: Image.Image, *boxes: tuple[float, float, float, float]) -> np.ndarray:
    """Where a copy differs from the picture, which must stay as it was."""
    before = np.array(image)
    copy = draw_faces(image, [(Face(box), "Happiness 0.90") for box in boxes])
    np.testing.assert_array_equal(np.asarray(image), before)
    assert (copy.size, copy.mode) == (image.size, "RGB")
    return (np.asarray(copy) != before).any(axis=-1)


def test_box_has_its_edges_and_its_label_inside():
    changed = drawn(Image.new("RGB", (400, 300)), (100, 50, 300, 250))
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 250, 100, 300)
    assert changed[50, 100:301].all() and changed[50:251, 300].all()
    assert not changed[120:240, 110:290].any()  # the face itself stays to be seen
    assert changed[51:62, 101:140].mean() > 0.5  # the label


def test_every_face_is_drawn():
    changed = drawn(Image.new("RGB", (400, 300)), (10, 10, 110, 110), (200, 100, 390, 290))
    assert changed[60, [10, 110, 200, 390]].tolist() == [True, True, False, False]
    assert changed[200, [10, 110, 200, 390]].tolist() == [False, False, True, True]


def test_no_face_changes_nothing():
    assert not drawn(Image.new("RGB", (40, 30))).any()


@pytest.mark.parametrize(
    "box", [(-50, -50, 20, 20), (0, 0, 40, 30), (-9, -9, 99, 99), (30, 2, 60, 9)]
)
def test_box_beyond_the_picture_is_cut_at_its_border(box):
    rows, columns = np.nonzero(drawn(Image.new("RGB", (40, 30)), box))
    assert (rows.min(), columns.min()) == (max(0, box[1]), max(0, box[0]))


@pytest.mark.parametrize("box", [(100, 100, 120, 120), (-20, -20, -5, -5), (40, 0, 50, 9)])
def test_box_outside_is_not_drawn(box):
    assert not drawn(Image.new("RGB", (40, 30)), box).any()


@pytest.mark.parametrize("label", ["Überraschung", "驚き", "a" * 300])
def test_any_label(label):
    image = Image.new("RGB", (60, 40))
    assert draw_faces(image, [(Face((5, 5, 50, 35)), f"{label} 1.00")]).size == (60, 40)
