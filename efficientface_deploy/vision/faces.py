"""Faces in pictures: what a detector finds, and how it is cut as the training faces were.

Coordinates are pixels from the picture's upper left corner, x to the right and y down; the centre
of the first pixel is (0.5, 0.5). "Left" is left in the picture, not the person's own.

The crop policy is the ModelSpec's ``face_crop``, and :func:`cut_face` is the one place that reads
it:

===========  ======================================================================================
``box``      A square around the middle of the box, its side ``BOX_SCALE`` times the box's
             longer side (AffectNet, FER+).
``aligned``  The five points are brought to ``TEMPLATE`` by the similarity that fits them best:
             turned, scaled and moved, never sheared (RAF-DB).
``as-is``    As ``box``, which is a guess: training pictures were used whole (CAER-S, your own).
===========  ======================================================================================

A face at the border is padded, never squeezed: the picture's edge goes on. (Black in its place cost
one point of accuracy on close-ups, of which nearly every square reaches beyond the picture.) Beyond
an aligned face it is black.

A head that is turned by more than 45 degrees is set upright, by its points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientface_deploy.errors import ImageError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import UInt8Array

Point = tuple[float, float]
Float64Array = npt.NDArray[np.float64]

# How far FER+'s 48x48 pictures reach beyond CenterFace's boxes: the median over 137 of 150 random
# faces (those found with a score above 0.6), whose centres agree with the boxes' to 1 %.
BOX_SCALE = 1.04

# Pixels of a box's longer side below which a face is marked rather than judged. Of 1,200 faces of
# FER+'s validation split, made smaller, the bundled model labelled right: at 48 pixels 84 %, 32
# 79 %, 24 73 %, 20 66 %, 16 59 %, 12 46 %.
SMALL = 24.0

# A head that is turned by more is set upright, exactly. Of the photographs that were found after a
# turn by 60 degrees, 59 % were labelled right as they were, 84 % after the nearest quarter turn and
# 87 % so; by 90 degrees 45, 92 and 92 %.
MAX_TILT = math.radians(45)

# Left eye, right eye, tip of the nose, left and right corner of the mouth, in a square of side 1:
# the template of InsightFace (Deng et al., ArcFace, CVPR 2019), given there for 112x112 pixels.
# RAF-DB publishes aligned pictures, but not where it put the points: this is an approximation.
TEMPLATE = (
    np.array(
        [
            (38.2946, 51.6963),
            (73.5318, 51.5014),
            (56.0252, 71.7366),
            (41.5493, 92.3655),
            (70.7299, 92.2041),
        ]
    )
    / 112
)

# A cut-out larger than the picture by this factor is a detector's mistake, not a face.
_MAX_EXCESS = 3


@dataclasses.dataclass(frozen=True)
class Face:
    """Where a face is.

    Attributes:
        box: Left, top, right, bottom in pixels; may reach beyond the picture.
        score: The detector's confidence, 0 to 1; None where nobody searched and the whole picture
            is taken for the face.
        landmarks: Left eye, right eye, tip of the nose, left and right corner of the mouth, each
            (x, y) in pixels; None from a detector that has none.

    Raises:
        ImageError: The box is empty, or a number is not finite.
    """

    box: tuple[float, float, float, float]
    score: float | None = None
    landmarks: tuple[Point, Point, Point, Point, Point] | None = None

    def __post_init__(self) -> None:
        box, points = np.ravel(self.box), np.ravel(self.landmarks or ())
        possible = box.size == 4 and points.size in (0, 10)
        possible = possible and bool(np.isfinite(box).all() and np.isfinite(points).all())
        if not possible or box[0] >= box[2] or box[1] >= box[3]:
            expected = "left < right, top < bottom, and five points or none, all finite"
            found = f"box {self.box}, landmarks {self.landmarks}"
            raise ImageError("face", expected, found, "check the detector that made it")

    @property
    def side(self) -> float:
        """The box's longer side, pixels."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)

    @property
    def small(self) -> bool:
        """Whether it has too few pixels to be judged: see ``SMALL``."""
        return self.side < SMALL


class FaceDetector(Protocol):
    """What finds faces; :func:`efficientface_deploy.open_detector` opens those that we know."""

    def detect(self, image: UInt8Array) -> Sequence[Face]:
        """Find faces.

        Args:
            image: uint8 (H, W, 3), RGB, upright.

        Returns:
            The faces, the most confident first; empty where there is none.
        """


def whole_picture(image: Image.Image) -> Face:
    """The face of a picture that shows nothing else."""
    return Face((0.0, 0.0, float(image.width), float(image.height)))


def cut_face(
    image: Image.Image, face: Face, spec: ModelSpec, *, scale: float = BOX_SCALE
) -> Image.Image:
    """Cut a face as the model's training faces were cut; see the module's description.

    Args:
        image: PIL image of mode RGB.
        face: A face in it.
        spec: Gives ``face_crop``.
        scale: Side of the square by the box's longer side; without a meaning for aligned faces.

    Returns:
        A square PIL image of mode RGB, about as many pixels wide as the face is in the picture.

    Raises:
        ImageError: The model wants aligned faces and this one has no landmarks, or the face is far
            larger than the picture.
    """
    if spec.face_crop == "aligned":
        return _align(image, face)
    left, top, right, bottom = face.box
    side = _side(scale * face.side, image)
    angle = 0.0 if face.landmarks is None else tilt(np.array(face.landmarks))
    upright = abs(angle) <= MAX_TILT
    around = side if upright else math.ceil(side * math.sqrt(2))  # corners come in when it turns
    corner = round((left + right - around) / 2), round((top + bottom - around) / 2)
    cut = cut_square(image, *corner, around)
    if upright:
        return cut
    turned = cut.rotate(math.degrees(angle), Image.Resampling.BILINEAR)
    inset = (around - side) // 2
    return turned.crop((inset, inset, inset + side, inset + side))


def cut_square(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    """A square of a picture, whose edge goes on where the square reaches beyond it."""
    ends = left + side, top + side
    square = image.crop((left, top, *ends))  # black beyond the picture
    inside = max(left, 0), max(top, 0), min(ends[0], image.width), min(ends[1], image.height)
    whole = inside == (left, top, *ends)
    if whole or inside[0] >= inside[2] or inside[1] >= inside[3]:
        return square
    beyond = [(inside[1] - top, ends[1] - inside[3]), (inside[0] - left, ends[0] - inside[2])]
    shown = np.asarray(image.crop(inside))
    return Image.fromarray(np.pad(shown, [*beyond, (0, 0)], mode="edge"))


def tilt(landmarks: Float64Array) -> float:
    """By what angle a face is turned clockwise, radians, -pi to pi.

    Args:
        landmarks: (5, 2), in the order of :class:`Face`.
    """
    # The rotation of the best similarity, as a complex number: this is done for every face.
    source, target = (points[:, 0] + 1j * points[:, 1] for points in (TEMPLATE, landmarks))
    turn = np.vdot(source - source.mean(), target)
    return math.atan2(turn.imag, turn.real)


def similarity(source: Float64Array, target: Float64Array) -> Float64Array:
    """The similarity that takes points nearest to others, in the sense of least squares.

    S. Umeyama, "Least-squares estimation of transformation parameters between two point patterns",
    IEEE Transactions on Pattern Analysis and Machine Intelligence 13 (1991), equations 40 to 42.

    Args:
        source: (N, 2); not all of them the same point.
        target: (N, 2).

    Returns:
        A matrix (2, 3): scale and rotation, without reflection, and the translation.
    """
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    source, target = source - source_mean, target - target_mean
    left, values, right = np.linalg.svd(target.T @ source / len(source))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    scale = (values * signs).sum() / source.var(axis=0).sum()
    linear = scale * (left * signs) @ right  # (2, 2)
    return np.column_stack([linear, target_mean - linear @ source_mean])


def _align(image: Image.Image, face: Face) -> Image.Image:
    if face.landmarks is None:
        expected = "five landmarks, since this model was trained on aligned faces"
        fix = "take a detector that gives landmarks (centerface, yunet)"
        raise ImageError("face", expected, "a box alone", fix)
    # From the template to the picture, which is what a warp asks for each pixel that it fills.
    warp = similarity(TEMPLATE, np.array(face.landmarks))
    # As many pixels as the picture has there: the only resize stays that of preprocess.py.
    side = _side(math.hypot(warp[0, 0], warp[1, 0]), image)
    warp[:, :2] /= side
    return image.transform(
        (side, side), Image.Transform.AFFINE, warp.ravel().tolist(), Image.Resampling.BILINEAR
    )


def _side(length: float, image: Image.Image) -> int:
    """A cut-out's side in whole pixels."""
    if length > _MAX_EXCESS * max(image.size):
        expected = f"one within the picture of {image.width}x{image.height}"
        found = f"one {length:.0f} pixels wide"
        raise ImageError("face", expected, found, "check the detector that made it")
    return max(1, round(length))
