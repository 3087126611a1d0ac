"""The search for faces of any size: the same network at several sizes of the picture, merged.

A network that looks for faces knows them from some ten to some hundred pixels. Of a picture it
sees one copy that is fine enough for the smallest face that is wanted, and coarser ones, each a
sixteenth of the work, for what fills the picture.
"""

from __future__ import annotations

import abc
import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientface_deploy.artifact import free_sizes
from efficientface_deploy.backends import resolve_backend
from efficientface_deploy.backends.base import import_package, library_call
from efficientface_deploy.backends.onnx import SessionError, find_provider, open_session
from efficientface_deploy.errors import ArtifactError, BackendError, ConfigError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.faces import (
    MAX_TILT,
    SMALL,
    Face,
    FaceDetector,
    Float64Array,
    cut_face,
    cut_square,
    tilt,
    whole_picture,
)
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, resize

BoolArray = npt.NDArray[np.bool_]

MIN_SCORE = 0.5  # CenterFace's published demo; YuNet's authors take 0.6 to 0.9
MAX_SIDE = 2048  # pixels of the finest copy; it takes 100 MB

MAX_OVERLAP = 0.3  # intersection over union from which two boxes are one face; both authors'
_MAX_WITHIN = 0.8  # of a box that lies in another one's: then it is a part of that face
_MAX_COVERED = 0.4  # of a box that other faces cover, of a finer copy: then it is none

_CHEAP = 0.5  # scale: shrinking by halves is ten times as fast as by anything near
_ORDINARY = 512  # pixels: pictures up to here are searched as they are
_LEAST = 192  # smaller ones are enlarged to this
_STEP = 4  # from one copy to the next
_COARSEST = 256  # no further copy below this

# A second look at what may be a head that lies or hangs, which these networks half see: at most so
# many of a picture, each in a square so many times as large as the box, of so many pixels.
_MOST_LOOKS, _AROUND, _LOOK = 8, 2.0, 128
_CANDIDATE = 0.15  # score from which there may be one
_BETTER = 0.05  # by how much its score must rise when it is turned
_SURE = 0.8  # what its score must be then, where it was too small to be a face's

_MOST_THREADS = 256  # as of a predictor

_MULTIPLE = 32  # these networks halve the picture five times


class Found(NamedTuple):
    """Faces in one copy of a picture.

    Attributes:
        boxes: (N, 4), left, top, right, bottom, pixels.
        scores: (N,), 0 to 1.
        points: (N, 5, 2), x and y in pixels, in the order of :class:`Face`.
    """

    boxes: Float64Array
    scores: Float64Array
    points: Float64Array

    def of(self, which: Any) -> Found:
        """Some of them, as numpy's index says."""
        return Found(self.boxes[which], self.scores[which], self.points[which])


class OnnxDetector(abc.ABC):
    """A network that finds faces, on ONNX Runtime; threads may share it.

    Pickled or copied, it is what it was opened with, and opens again. It does not survive a fork:
    in the child its use is an error.

    Args:
        min_score: Smallest score of a face, 0 to 1.
        max_side: Longer side of the largest copy that is searched, pixels.
        min_face: Longer side of the smallest face that is wanted, pixels of the picture: the search
            is as fine as that takes, and smaller ones are left out. None searches as fine as is
            cheap, and leaves none out: faces of 28 pixels are found, and some smaller ones.
        threads: CPU threads; None takes the CPUs that this process may use.
        backend: ``onnx``, ``onnx:cuda``, ...: what a predictor takes.

    Raises:
        ConfigError: An argument that cannot be used.
        BackendError: onnxruntime, or the provider, is not here.
        ArtifactError: The model file cannot be used.
    """

    name: ClassVar[str]
    input_name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    smallest: ClassVar[float]  # pixels of a copy; of smaller faces many are not found
    largest: ClassVar[float]  # larger ones are found in part, or not
    doubtful: ClassVar[float] = 0.0  # score below which a head may be one that lies or hangs

    def __init__(
        self,
        *,
        min_score: float = MIN_SCORE,
        max_side: int = MAX_SIDE,
        min_face: float | None = None,
        threads: int | None = None,
        backend: str = "onnx",
    ) -> None:
        _check("min_score", min_score, 0, 1)
        _check("max_side", max_side, _MULTIPLE, 1 << 14, int)
        if min_face is not None:
            _check("min_face", min_face, 1, 1 << 14)
        if threads is not None:
            _check("threads", threads, 1, _MOST_THREADS, int)
        self.min_score, self.max_side, self.min_face = min_score, max_side, min_face
        self._options: dict[str, Any] = {
            **{"min_score": min_score, "max_side": max_side, "min_face": min_face},
            **{"threads": threads, "backend": backend},
        }
        subject = f"face detector {self.name}"
        import_package("onnxruntime", subject, "onnxruntime", "cpu")
        _, device = resolve_backend(Path("detector.onnx"), backend)
        device = device or "cpu"
        plugin_devices = find_provider(device)
        path, model = self._read_model()
        expected = f"a model of {self.name} that this onnxruntime can load"
        try:
            model = free_sizes(model, self.input_name)
            self._session = open_session(model, device, plugin_devices, threads=threads)
        except (SessionError, ValueError) as error:
            raise ArtifactError(path, expected, str(error), self._fix()) from None
        found = {output.name for output in self._session.get_outputs()}
        if not found.issuperset(self.outputs):
            raise ArtifactError(path, expected, f"outputs {', '.join(sorted(found))}", self._fix())
        self._process = os.getpid()

    @abc.abstractmethod
    def _read_model(self) -> tuple[Path, bytes]:
        """The model file, and what is in it."""

    @abc.abstractmethod
    def search(self, picture: UInt8Array, min_score: float) -> Found:
        """Find faces in a picture as it is, boxes that overlap included.

        Args:
            picture: uint8 (H, W, 3), RGB.
            min_score: Smallest score of a face.
        """

    def _fix(self) -> str:
        return "install its package again"

    def detect(self, image: UInt8Array | Image.Image) -> list[Face]:
        """Find faces, the most confident first; see :class:`efficientface_deploy.FaceDetector`.

        Args:
            image: As there, or a PIL image of mode RGB, which spares a copy.
        """
        if os.getpid() != self._process:  # ONNX Runtime would wait for the parent's threads
            told, fix = "one that was opened before a fork", "open it in the child"
            raise BackendError(
                f"face detector {self.name}", "one that this process opened", told, fix
            )
        original = picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        scales = self._scales(max(original.size))
        min_score = min(self.min_score, _CANDIDATE) if self.doubtful else self.min_score
        pictures, copies = [original], []
        for scale in scales:
            picture = _resized(picture, original.size, scale)
            pictures.append(picture)
            found = self.search(np.asarray(picture), min_score)
            ratio = np.divide(picture.size, original.size)  # width's, height's
            boxes, points = found.boxes / (*ratio, *ratio), found.points / ratio
            copies.append(Found(boxes, found.scores, points))
        found = merge(copies, [self.largest / scale for scale in scales], self.min_score)
        if self.min_face is not None:
            found = found.of(_sides(found.boxes) >= self.min_face)
        found = self._look_again(pictures, found)
        return list(map(_face, *found.of(found.scores >= self.min_score)))

    def _look_again(self, pictures: Sequence[Image.Image], found: Found) -> Found:
        """The same faces, those that lie or hang with the points of the head as it is.

        Args:
            pictures: The picture and its copies, the finest first.
            found: In the picture's pixels.
        """
        tilts = np.array([tilt(five) for five in found.points])
        sides = _sides(found.boxes)
        in_doubt = (found.scores < self.doubtful) | (abs(tilts) > MAX_TILT)
        (doubtful,) = np.nonzero(in_doubt & (sides >= SMALL))
        for one in sorted(doubtful, key=lambda at: -sides[at])[:_MOST_LOOKS]:  # the largest
            box = found.boxes[one]
            side = round(_AROUND * float(sides[one]))
            corner = np.round((box[:2] + box[2:] - side) / 2)
            square = np.asarray(_look(pictures, corner, side))
            looks = [self._middle(np.rot90(square, turns)) for turns in range(4)]
            turns = int(np.argmax([look.scores[0] for look in looks]))
            wanted = looks[0].scores[0] + _BETTER
            if found.scores[one] < self.min_score:  # it was none until now
                wanted = max(wanted, _SURE)
            if looks[turns].scores[0] > wanted:
                boxes, scores, points = _turned_back(looks[turns], turns)
                found.boxes[one] = boxes[0] * side / _LOOK + np.tile(corner, 2)
                found.points[one] = points[0] * side / _LOOK + corner
                found.scores[one] = scores[0]
        return found.of(suppress(found.boxes, found.scores))

    def _middle(self, square: UInt8Array) -> Found:
        """The most confident face about the middle of a square; one of score 0 where none is."""
        found = self.search(square, _CANDIDATE)
        middles = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
        found = found.of((abs(middles - _LOOK / 2) < _LOOK / 6).all(axis=1))
        nothing = Found(np.zeros((1, 4)), np.zeros(1), np.zeros((1, 5, 2)))
        return found.of([found.scores.argmax()]) if found.scores.size else nothing

    def _scales(self, longest: int) -> list[float]:
        """By what factors a picture is copied, the finest first."""
        if self.min_face is None:
            wanted = max(_CHEAP * longest, min(longest, _ORDINARY))
        else:
            wanted = longest * self.smallest / self.min_face
        side = min(max(wanted, _LEAST), self.max_side)
        scales = [side / longest]
        while scales[-1] * longest > _COARSEST:
            scales.append(scales[-1] / _STEP)
        return scales

    def _run(self, picture: UInt8Array) -> list[Float32Array]:
        """The network's outputs for a picture, each without the batch's axis.

        Args:
            picture: uint8 (H, W, 3), in the order of colours that the network takes; it is filled
                up with black to whole cells.
        """
        height, width = picture.shape[:2]
        sides = [side + -side % _MULTIPLE for side in (height, width)]
        batch: Float32Array = np.zeros((1, 3, *sides), np.float32)
        batch[0, :, :height, :width] = picture.transpose(2, 0, 1)
        with library_call():
            outputs = self._session.run(self.outputs, {self.input_name: batch})
        return [one[0] for one in outputs]

    def __reduce__(self) -> tuple[object, ...]:
        return functools.partial(type(self), **self._options), ()

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"{type(self).__name__}({options})"


def merge(copies: Sequence[Found], largest: Sequence[float], min_score: float) -> Found:
    """The faces of a picture, from those of its copies.

    Args:
        copies: Of each what was found in it, in pixels of the picture; the finest first.
        largest: Of each the largest face that can be found in it, in pixels of the picture.
        min_score: Smallest score of a face that is taken for one.

    Returns:
        The faces, the most confident first. What a copy shows within a face that is too large for
        it is a part of that face. What a coarse copy shows between faces of a finer one, which
        would show it better, is none.
    """
    kept: list[Found] = []
    for number, found in enumerate(copies):
        coarser = [other.boxes[other.scores >= min_score] for other in copies[number + 1 :]]
        large = np.concatenate([_NONE, *coarser])
        large = large[_sides(large) > largest[number]]
        parts = (_shared(found.boxes, large) > _MAX_WITHIN).any(axis=1)
        kept.append(found.of(~parts))
    for number, found in enumerate(kept):
        between = np.zeros(len(found.boxes), bool)
        for finer, most in zip(kept[:number], largest, strict=False):
            faces = finer.of(finer.scores >= min_score)
            faces = faces.of(suppress(faces.boxes, faces.scores))
            between |= _between(found.boxes, faces.boxes) & (_sides(found.boxes) <= most)
        kept[number] = found.of(~between)
    merged = Found(*(np.concatenate(values) for values in zip(*kept, strict=True)))
    return merged.of(suppress(merged.boxes, merged.scores))


def suppress(boxes: Float64Array, scores: Float64Array) -> list[int]:
    """Greedy non-maximum suppression: of two boxes for one face the less confident is left out.

    Args:
        boxes: (N, 4), left, top, right, bottom.
        scores: (N,).

    Returns:
        Indices of the boxes that stay, the most confident first.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)  # (N,)
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while left.size:
        best, rest = int(left[0]), left[1:]
        kept.append(best)
        near = np.maximum(boxes[best, :2], boxes[rest, :2])
        far = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.prod(np.clip(far - near, 0, None), axis=1)
        left = rest[shared < MAX_OVERLAP * (areas[best] + areas[rest] - shared)]
    return kept


_NONE: Float64Array = np.empty((0, 4))


def _sides(boxes: Float64Array) -> Float64Array:
    """Longer sides (N,)."""
    sides: Float64Array = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
    return sides


def _shared(boxes: Float64Array, others: Float64Array) -> Float64Array:
    """How much of each box lies within each of the others, (N, M), 0 to 1."""
    near = np.maximum(boxes[:, None, :2], others[None, :, :2])  # (N, M, 2)
    far = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)  # (N,)
    shared = np.prod(np.clip(far - near, 0, None), axis=2)
    parts: Float64Array = shared / np.maximum(areas, 1e-9)[:, None]
    return parts


def _between(boxes: Float64Array, faces: Float64Array) -> BoolArray:
    """Which boxes (N,) are largely covered by faces, and are none of them."""
    covered, within = _shared(boxes, faces), _shared(faces, boxes).T  # (N, M)
    union = covered + within - covered * within  # by the product of their areas, by what they share
    same = (covered > 0) & (covered * within >= MAX_OVERLAP * union)
    answers: BoolArray = (covered.sum(axis=1) > _MAX_COVERED) & ~same.any(axis=1)
    return answers


def _resized(picture: Image.Image, full: tuple[int, int], scale: float) -> Image.Image:
    """A picture, or a finer copy of it, brought to a scale of the picture's own size."""
    size = max(1, round(full[0] * scale)), max(1, round(full[1] * scale))
    if size == picture.size:
        return picture
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.0)


def _look(pictures: Sequence[Image.Image], corner: Float64Array, side: int) -> Image.Image:
    """A square of a picture, small, of the coarsest copy that is fine enough for it."""
    scales = [picture.width / pictures[0].width for picture in pictures]
    enough = [at for at, scale in enumerate(scales) if side * scale >= _LOOK]
    at = enough[-1] if enough else 0
    left, top = np.round(corner * scales[at]).astype(int).tolist()
    square = cut_square(pictures[at], left, top, round(side * scales[at]))
    return square.resize((_LOOK, _LOOK), Image.Resampling.BILINEAR, reducing_gap=1.0)


def _turned_back(found: Found, turns: int) -> Found:
    """What was found in a square that was turned by quarters, counter-clockwise, as it was."""
    boxes, points = found.boxes.reshape(-1, 2, 2), found.points  # (N, 2, 2): corners
    for _ in range(turns):
        boxes, points = (
            np.stack([_LOOK - xy[..., 1], xy[..., 0]], axis=-1) for xy in (boxes, points)
        )
    boxes = np.concatenate([boxes.min(axis=1), boxes.max(axis=1)], axis=1)
    return Found(boxes, found.scores, points)


def _face(box: Float64Array, score: float, points: Float64Array) -> Face:
    left, top, right, bottom = box.tolist()
    one, two, three, four, five = ((x, y) for x, y in points.tolist())
    return Face((left, top, right, bottom), float(score), (one, two, three, four, five))


def _check(name: str, value: float, least: float, most: float, kind: type = float) -> None:
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and least <= value <= most):
        expected = f"a {'whole ' * (kind is int)}number from {least} to {most}"
        raise ConfigError(name, expected, repr(value)[:40], "leave it out")


def find_faces(
    image: Image.Image, detector: FaceDetector | None, spec: ModelSpec
) -> tuple[Sequence[Face], Iterator[UInt8Array]]:
    """The faces of a picture, and of each the model's input, cut when it is asked for.

    Args:
        image: Of mode RGB.
        detector: Ours, or one that takes an array; without one the picture is a face.
        spec: The model's.

    Returns:
        The faces, the most confident first, and for each uint8 (S, S, 3), RGB.

    Raises:
        ImageError: The detector gives what the model cannot use.
    """
    if detector is None:
        return [whole_picture(image)], iter([resize(image, spec)])
    faces: Sequence[Face]
    if isinstance(detector, OnnxDetector):  # ours take the picture as it is
        faces = detector.detect(image)
    else:
        faces = detector.detect(np.asarray(image))
    return faces, (resize(cut_face(image, face, spec), spec) for face in faces)
