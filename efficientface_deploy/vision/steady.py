"""Labels of a stream that do not flicker, and what they say over time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.vision.tracks import MEMORY

# Chosen on sequences of FER+'s training faces, several of a class with crops that shake: at 25
# frames a second 4 to 6 % of the flips are left, and a change of expression shows 0.26 to 0.29 s
# after it came. docs/faces-and-video.md has the figures of other faces.
TIME_CONSTANT = 0.2  # seconds
_MARGIN = 1.0  # by which another label's log-probability must be higher than the shown one's
_LEAST = 1e-3  # smaller probabilities are noise, whose logarithm would outweigh many frames

_FIRST_SECONDS = 0.04  # for which a face's first frame counts
_LEAST_SECONDS = 1e-3  # for which every frame counts, where times stand still


@dataclasses.dataclass
class _State:
    mean: Float32Array  # log-probabilities (C,)
    weight: float  # of what was seen: 1 after several time constants
    seen: float  # seconds
    label: int


class SteadyLabels:
    """Averages the log-probabilities of each face over time, and holds its label.

    The weight of a frame falls with its age in seconds, so the frame rate does not matter. A label
    changes when another is more probable by a margin.

    Args:
        time_constant: Seconds after which a frame counts for 1/e.
    """

    def __init__(self, time_constant: float = TIME_CONSTANT) -> None:
        self._time_constant = time_constant
        self._states: dict[int, _State] = {}

    def update(
        self, track: int, seconds: float, probabilities: Float32Array
    ) -> tuple[Float32Array, int]:
        """Take in what a network says about a face at a time.

        Args:
            track: The face's number.
            seconds: The frame's time, not before that of the last one.
            probabilities: (C,), which sum to 1.

        Returns:
            The smoothed probabilities, float32 (C,), and the index of the label.
        """
        logs = np.log(np.maximum(probabilities, _LEAST))
        for other in [key for key, one in self._states.items() if seconds - one.seen > MEMORY]:
            del self._states[other]
        state = self._states.get(track)
        if state is None:
            weight = self._share(_FIRST_SECONDS)
            state = _State(logs, weight, seconds, int(logs.argmax()))
            self._states[track] = state
        else:
            share = self._share(max(seconds - state.seen, _LEAST_SECONDS))
            state.weight += share * (1 - state.weight)
            state.mean = state.mean + share / state.weight * (logs - state.mean)
            state.seen = seconds
            best = int(state.mean.argmax())
            if state.mean[best] > state.mean[state.label] + _MARGIN:
                state.label = best
        smooth = np.exp(state.mean)
        return smooth / smooth.sum(), state.label

    def _share(self, seconds: float) -> float:
        return -math.expm1(-seconds / self._time_constant)


@dataclasses.dataclass(frozen=True)
class Event:
    """A face had one label for a while.

    Attributes:
        track: The face's number.
        label: Its label.
        start: Seconds of the first frame with it.
        end: Seconds of the last one.
    """

    track: int
    label: str
    start: float
    end: float


class Events:
    """Joins the labels of a stream's frames to events.

    A face that is not seen for less than two seconds and has the same label then has had it.
    """

    def __init__(self) -> None:
        self._open: dict[int, Event] = {}

    def update(self, seconds: float, labels: Mapping[int, str]) -> list[Event]:
        """Take in a frame.

        Args:
            seconds: Its time, not before that of the last one.
            labels: Each face's number, with its label.

        Returns:
            The events that ended before it.
        """
        ended = []
        for track, event in list(self._open.items()):
            changed = track in labels and labels[track] != event.label
            if changed or seconds - event.end > MEMORY:
                ended.append(self._open.pop(track))
        for track, label in labels.items():
            start = self._open[track].start if track in self._open else seconds
            self._open[track] = Event(track, label, start, seconds)
        return ended

    def end(self) -> list[Event]:
        """The events that the stream's end has ended."""
        ended, self._open = list(self._open.values()), {}
        return ended
