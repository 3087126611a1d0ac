"""Which face of a frame is which face of the frames before it.

A face goes to the track whose guessed place, from where it was and how it moved, is nearest in
widths of the face. That is all that faces need: they are few, large and apart. The libraries for it
(norfair, supervision, boxmot) bring SciPy, OpenCV or PyTorch, for association in crowds and by
looks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from efficientface_deploy.vision.faces import Face, Float64Array

MEMORY = 2.0  # seconds for which a face that is not seen keeps its number

# How far from its guessed place a face may be, in its own widths: at once, and for each second that
# it was not seen. A head that is thrown about moves by three to four widths a second.
_REACH, _REACH_PER_SECOND, _MAX_REACH = 0.5, 3.0, 2.0
_MAX_GROWTH = 0.7  # of the logarithm of its size: to twice as large, or to half
_LOST_COST = 0.3  # for each second, so that a face that was just seen goes before one that was lost

_MOVEMENT_SECONDS = 0.2  # over which a movement is averaged
_MOVEMENT_LASTS = 0.5  # seconds after which a movement that is not seen has died down


@dataclasses.dataclass(eq=False)
class _Track:
    number: int
    centre: Float64Array  # x, y in pixels
    size: float  # geometric mean of width and height, pixels
    seen: float  # seconds
    movement: Float64Array  # pixels a second

    def guess(self, seconds: float) -> Float64Array:
        """Where its centre is at another time."""
        lasts = _MOVEMENT_LASTS * -math.expm1((self.seen - seconds) / _MOVEMENT_LASTS)
        return self.centre + lasts * self.movement

    def follow(self, centre: Float64Array, size: float, seconds: float) -> None:
        """It was seen again."""
        if (passed := seconds - self.seen) > 0:
            share = -math.expm1(-passed / _MOVEMENT_SECONDS)
            self.movement += share * ((centre - self.centre) / passed - self.movement)
        self.centre, self.size, self.seen = centre, size, seconds


class Tracker:
    """Numbers the faces of a stream, from 1; a number is never given twice."""

    def __init__(self) -> None:
        self._tracks: list[_Track] = []
        self._numbers = itertools.count(1)

    def update(self, faces: Sequence[Face], seconds: float) -> list[int]:
        """The numbers of a frame's faces.

        Args:
            faces: In any order.
            seconds: The frame's time, not before the last one's.
        """
        self._tracks = [track for track in self._tracks if seconds - track.seen <= MEMORY]
        boxes = np.array([face.box for face in faces], np.float64).reshape(-1, 4)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2  # (N, 2)
        sizes = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))  # (N,)
        found = self._assign(centres, sizes, seconds)
        for index in range(len(faces)):
            if index in found:
                found[index].follow(centres[index], sizes[index], seconds)
            else:
                still = np.zeros(2)
                new = _Track(next(self._numbers), centres[index], sizes[index], seconds, still)
                found[index] = new
                self._tracks.append(new)
        return [found[index].number for index in range(len(faces))]

    def _assign(
        self, centres: Float64Array, sizes: Float64Array, seconds: float
    ) -> dict[int, _Track]:
        """Known tracks of faces, the nearest pairs first."""
        tracks = self._tracks
        if not tracks or not len(centres):
            return {}
        guesses = np.array([track.guess(seconds) for track in tracks])  # (T, 2)
        lost = np.array([[seconds - track.seen] for track in tracks])  # (T, 1)
        known = np.array([[track.size] for track in tracks])
        growth = np.abs(np.log(sizes / known))  # (T, N)
        distance = np.linalg.norm(guesses[:, None] - centres, axis=-1)  # (T, N)
        distance /= np.sqrt(sizes * known)
        reach = np.minimum(_REACH + _REACH_PER_SECOND * lost, _MAX_REACH)
        cost = distance + growth + _LOST_COST * lost
        cost[(distance > reach) | (growth > _MAX_GROWTH)] = np.inf
        found: dict[int, _Track] = {}
        for pair in np.argsort(cost, axis=None):
            row, column = divmod(int(pair), len(centres))
            if cost[row, column] == np.inf:
                break
            if column not in found and tracks[row] not in found.values():
                found[column] = tracks[row]
        return found
