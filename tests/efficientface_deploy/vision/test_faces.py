from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from efficientface_deploy.errors import ImageError
from efficientface_deploy.spec import PRESETS
from efficientface_deploy.vision.faces import BOX_SCALE, TEMPLATE, Face, cut_face, similarity

BOX = PRESETS["ferplus"]
ALIGNED = PRESETS["rafdb"]


def moved(points: np.ndarray, scale: float, degrees: float, shift: tuple[float, float]):
    turn = math.radians(degrees)
    matrix = scale * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return points @ matrix.T + shift


def face_at(scale: float, degrees: float, shift: tuple[float, float]) -> Face:
    """A face whose landmarks are the template, scaled, turned and moved."""
    points = moved(TEMPLATE, scale, degrees, shift)
    box = (*points.min(axis=0), *points.max(axis=0))
    return Face(tuple(map(float, box)), 1.0, tuple(map(tuple, points.tolist())))


@pytest.fixture
def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(1, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---- boxes


@pytest.mark.parametrize("crop", ["box", "as-is"])
def test_box_becomes_a_square_around_its_middle(noise, crop):
    cut = cut_face(noise, Face((40, 20, 60, 70)), BOX.replace(face_crop=crop))
    side = round(50 * BOX_SCALE)  # 52, around (50, 45)
    assert cut.size == (side, side) == (52, 52)
    np.testing.assert_array_equal(np.asarray(cut), np.asarray(noise)[19:71, 24:76])


@pytest.mark.parametrize(
    ("box", "inside"),  # inside: rows and columns of the cut that show the picture
    [
        ((-25, -25, 25, 25), (slice(26, 52), slice(26, 52))),
        ((95, 65, 145, 115), (slice(0, 26), slice(0, 26))),
        ((35, -30, 85, 20), (slice(31, 52), slice(0, 52))),
    ],
)
def test_face_at_the_border_is_padded_not_squeezed(noise, box, inside):
    cut = np.array(cut_face(noise, Face(box), BOX))
    assert cut.shape == (52, 52, 3)
    rows, columns = (slice(*part.indices(52)) for part in inside)
    shown = cut[rows, columns]
    left, top = round((box[0] + box[2] - 52) / 2), round((box[1] + box[3] - 52) / 2)
    picture = np.asarray(noise)
    np.testing.assert_array_equal(
        shown, picture[top + rows.start :, left + columns.start :][: len(shown), : shown.shape[1]]
    )
    beyond = [(rows.start, 52 - rows.stop), (columns.start, 52 - columns.stop), (0, 0)]
    np.testing.assert_array_equal(cut, np.pad(shown, beyond, mode="edge"))


def test_face_smaller_than_a_pixel(noise):
    assert cut_face(noise, Face((5, 5, 5.2, 5.3)), BOX).size == (1, 1)
    assert cut_face(noise, face_at(0.3, 0, (5, 5)), ALIGNED).size == (1, 1)


def test_face_without_any_picture_is_black(noise):
    assert np.asarray(cut_face(noise, Face((500, 500, 540, 540)), BOX)).max() == 0


# ---- alignment


@pytest.mark.parametrize("degrees", [0, 17, -80, 180])
@pytest.mark.parametrize("scale", [0.1, 1, 300])
def test_similarity_finds_scale_rotation_and_translation(degrees, scale):
    target = moved(TEMPLATE, scale, degrees, (30, -7))
    matrix = similarity(TEMPLATE, target)
    np.testing.assert_allclose(TEMPLATE @ matrix[:, :2].T + matrix[:, 2], target, atol=1e-9 * scale)
    assert np.linalg.det(matrix[:, :2]) == pytest.approx(scale**2)


def test_similarity_does_not_mirror():
    matrix = similarity(TEMPLATE, TEMPLATE * (-1, 1))
    assert np.linalg.det(matrix[:, :2]) > 0


@given(st.integers(0, 2**32 - 1))
def test_no_other_similarity_is_nearer(seed):
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(2, 5, 2))

    def distance(matrix: np.ndarray) -> float:
        return float(((source @ matrix[:, :2].T + matrix[:, 2] - target) ** 2).sum())

    best = similarity(source, target)
    for _ in range(5):
        turn, shift = rng.normal(scale=0.01, size=(2, 2))
        near = best.copy()  # a similarity again: its linear part is a, -b, b, a
        near[:, :2] += [[turn[0], -turn[1]], [turn[1], turn[0]]]
        near[:, 2] += shift
        assert distance(near) >= distance(best)


@pytest.mark.parametrize("degrees", [0, 25, -120])
def test_aligned_points_come_to_the_template(degrees):
    face = face_at(100, degrees, (150, 140))
    pixels = np.zeros((300, 300, 3), np.uint8)
    for x, y in face.landmarks:
        pixels[round(y - 0.5), round(x - 0.5)] = 255
    cut = np.asarray(cut_face(Image.fromarray(pixels), face, ALIGNED))[..., 0].astype(float)
    assert cut.shape == (100, 100)  # as many pixels as the picture has there
    middles = np.stack(np.meshgrid(np.arange(100) + 0.5, np.arange(100) + 0.5), axis=-1)
    for point in TEMPLATE * 100:
        near = np.linalg.norm(middles - point, axis=-1) < 4
        centre = (middles[near] * cut[near][:, None]).sum(axis=0) / cut[near].sum()
        np.testing.assert_allclose(centre, point, atol=1)


def test_turned_photograph_gives_the_same_aligned_face(astronaut):
    # The landmarks that CenterFace finds in this photograph.
    eyes_nose_mouth = [
        (203.2, 101.7),
        (247.0, 104.5),
        (223.3, 125.1),
        (203.4, 142.3),
        (241.3, 144.4),
    ]
    upright = Face((181, 58, 270, 178), 0.9, tuple(eyes_nose_mouth))
    points = [(512 - y, x) for x, y in eyes_nose_mouth]  # a quarter to the right
    turned = Face((334, 181, 454, 270), 0.9, tuple(points))
    one = cut_face(Image.fromarray(astronaut), upright, ALIGNED)
    two = cut_face(Image.fromarray(np.rot90(astronaut, -1)), turned, ALIGNED)
    assert one.size == two.size
    difference = np.abs(np.asarray(one).astype(int) - np.asarray(two))
    assert difference.mean() < 1
    # The eyes lie level now: the cut's eye line is the template's, 0.46 of the way down.
    assert np.asarray(one).std() > 40


def test_aligned_face_at_the_border_is_padded(noise):
    cut = np.asarray(cut_face(noise, face_at(60, 0, (-30, 20)), ALIGNED))
    assert cut.shape == (60, 60, 3)
    assert cut[:, :29].max() == 0 and cut[:, 31:].min() > 0


def test_aligned_model_needs_landmarks(noise):
    with pytest.raises(ImageError, match=r"five landmarks.*found a box alone.*centerface"):
        cut_face(noise, Face((10, 10, 50, 50)), ALIGNED)


@pytest.mark.parametrize("crop", ["box", "as-is"])
@pytest.mark.parametrize("degrees", [0, 30, -40])
def test_head_that_is_hardly_tilted_is_cut_as_it_is(noise, crop, degrees):
    face = face_at(30, degrees, (60, 40))
    cut = cut_face(noise, face, BOX.replace(face_crop=crop))
    assert cut == cut_face(noise, Face(face.box), BOX)


@pytest.mark.parametrize("crop", ["box", "as-is"])
@pytest.mark.parametrize("degrees", [50, 90, 135, 180, -60, -90])
def test_tilted_head_is_set_upright(crop, degrees):
    face = face_at(100, degrees, (150, 140))
    pixels = np.zeros((300, 300, 3), np.uint8)
    for x, y in face.landmarks[:2]:  # the eyes
        pixels[round(y) - 2 : round(y) + 2, round(x) - 2 : round(x) + 2] = 255
    cut = np.asarray(cut_face(Image.fromarray(pixels), face, BOX.replace(face_crop=crop)))
    assert cut.shape == (round(BOX_SCALE * face.side),) * 2 + (3,)
    bright = np.argwhere(cut[..., 0] > 100)
    left, right = (
        part.mean(axis=0)
        for part in (
            bright[bright[:, 1] < cut.shape[0] / 2],
            bright[bright[:, 1] > cut.shape[0] / 2],
        )
    )
    assert left[0] == pytest.approx(right[0], abs=1.5)  # level
    assert left[0] < cut.shape[0] / 2  # and above


@pytest.mark.parametrize(("side", "small"), [(23.9, True), (24, False), (200, False)])
def test_small_face(side, small):
    assert Face((5, 5, 6, 5 + side)).small == Face((5, 5, 5 + side, 6)).small == small


# ---- what cannot be a face


@pytest.mark.parametrize(
    ("box", "landmarks"),
    [
        ((10, 10, 10, 20), None),
        ((10, 10, 20), None),
        ((10, 30, 20, 20), None),
        ((math.nan, 0, 1, 1), None),
        ((0, 0, math.inf, 1), None),
        ((0, 0, 1, 1), ((math.nan, 1),) * 5),
        ((0, 0, 1, 1), ((1, 1),) * 4),
    ],
)
def test_face_that_cannot_be(box, landmarks):
    with pytest.raises(ImageError, match="check the detector"):
        Face(box, 0.5, landmarks)


@pytest.mark.parametrize(
    ("face", "spec"),
    [(Face((0, 0, 1e9, 1e9)), BOX), (face_at(1e6, 0, (0, 0)), ALIGNED)],
    ids=["box", "aligned"],
)
def test_face_that_would_fill_the_memory(noise, face, spec):
    with pytest.raises(ImageError, match="within the picture of 120x90"):
        cut_face(noise, face, spec)


def test_coinciding_landmarks_are_no_traceback(noise):
    face = Face((5, 5, 9, 9), 0.5, ((7.0, 7.0),) * 5)
    assert cut_face(noise, face, ALIGNED).size == (1, 1)
