"""Synthetic faces with known label distributions, for ``make demo`` and the tests.

A cartoon portrait whose brows, lids, nose and mouth are moved by facial action units (Ekman and
Friesen's FACS). Reading order: draw the parameters, move the geometry, paint, light.

Label distribution. A face shows one or two expressions with intensities ``i_a + i_b <= 1``. The
target is ``i_a`` for the first, ``i_b`` for the second and ``1 - i_a - i_b`` for Neutral: a faint
expression shares its mass with Neutral. An action unit's level is the sum of the intensities of
the expressions it belongs to, so the picture shows exactly the numbers in the target.

Nothing else depends on the label: identity, pose, light, background and noise are drawn without
seeing it. Shift, rotation and scale together move brows and mouth about as far as the action
units do, so that no fixed pixel tells the class: a linear probe on pixels stays far below a
network (``tests/training/datasets/test_face_renderer.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

FloatArray = npt.NDArray[np.float64]
Colour = tuple[int, int, int]
Units = Mapping[int, float]
Generator = np.random.Generator
_Point = tuple[float, float]
T = TypeVar("T")

ACTION_UNITS: dict[str, tuple[int, ...]] = {
    "Neutral": (),
    "Happiness": (6, 12),
    "Sadness": (1, 4, 15),
    "Surprise": (1, 2, 5, 26),
    "Fear": (1, 2, 4, 5, 20, 26),
    "Disgust": (9, 15, 16),
    "Anger": (4, 5, 7, 23),
}
LABELS: tuple[str, ...] = tuple(ACTION_UNITS)

_BLEND_SHARE = 0.28
_MIN_SIZE, _MAX_SIZE = 32, 1024
# Drawing at three times the size and averaging is what makes the edges smooth: Pillow's polygons
# are not antialiased.
_SUPERSAMPLE = 3
# Half the face's height as a share of the picture's, at scale one: the face fills the picture, as
# it does in RAF-DB's aligned crops.
_FACE_UNIT = 0.46

_SKIN: tuple[Colour, ...] = (
    *((250, 224, 205), (240, 200, 172), (224, 178, 142), (198, 148, 112)),
    *((165, 114, 80), (128, 84, 58), (96, 62, 44)),
)
_HAIR: tuple[Colour, ...] = (
    *((32, 26, 24), (62, 42, 32), (104, 68, 42), (150, 104, 58)),
    *((206, 168, 104), (150, 70, 40), (158, 156, 156)),
)
_IRIS: tuple[Colour, ...] = ((70, 44, 28), (96, 66, 36), (64, 96, 130), (74, 104, 70))

# Curves that everything is made of, computed once: rendering is mostly small array operations.
_ARC = np.linspace(-1.0, 1.0, 17)
_CIRCLE = np.array([(np.sin(a), -np.cos(a)) for a in np.linspace(0, 2 * np.pi, 33)[:-1]])
_SKULL = np.array([(np.sin(a), -np.cos(a)) for a in np.linspace(-1.75, 1.75, 25)])
_BEZIER = np.array([((1 - t) ** 2, 2 * t * (1 - t), t**2) for t in np.linspace(0, 1, 9)])
_NECK = np.array([(-0.36, 0.5), (0.36, 0.5), (0.42, 1.6), (-0.42, 1.6)])


@dataclass(frozen=True)
class SyntheticFace:
    """One rendered face and its target.

    Attributes:
        image: uint8 (size, size, 3), RGB, 0 to 255.
        distribution: float32 (7,), in the order of :data:`LABELS`, sums to one.
        label: Index of the largest entry of ``distribution``.
    """

    image: npt.NDArray[np.uint8]
    distribution: npt.NDArray[np.float32]
    label: int


def render_face(seed: int, index: int, size: int = 100, variation: float = 1.0) -> SyntheticFace:
    """Render face number ``index`` of the collection ``seed``.

    The same arguments give the same bits in any order and process (of the same NumPy and Pillow);
    another ``size`` gives the same face at another resolution. The label is ``index % 7``, so every
    run of seven is balanced.

    Args:
        seed: Names the collection, 0 or more. Use different seeds for training and test.
        index: Number of the face in it, 0 or more.
        size: Height and width in pixels, 32 to 1024.
        variation: How far light, pose and expression depart from the middle of their ranges, 0 to
            1: with less of it a network learns sooner.

    Raises:
        ValueError: An argument is out of range, or no integer where it must be one.
    """
    for name, value, low, high in (
        ("seed", seed, 0, math.inf),
        ("index", index, 0, math.inf),
        ("size", size, _MIN_SIZE, _MAX_SIZE),
    ):
        is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not is_integer or not low <= value <= high:
            wanted = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name}: expected an integer {wanted}, found {value!r}")
    if not 0 <= variation <= 1:
        raise ValueError(f"variation: expected a number from 0 to 1, found {variation!r}")
    label, identity, scene, distribution, rng = _draw_face(seed, index, variation)
    geometry = face_geometry(identity, action_unit_levels(distribution))
    # The noise is drawn last: its amount depends on the size, the face must not.
    image = _light(_paint(geometry, identity, scene, int(size)), scene, rng)
    return SyntheticFace(image, distribution.astype(np.float32), label)


def face_target(
    seed: int, index: int, variation: float = 1.0
) -> tuple[int, npt.NDArray[np.float32]]:
    """Label and distribution of a face, without rendering it."""
    label, _, _, distribution, _ = _draw_face(seed, index, variation)
    return label, distribution.astype(np.float32)


def _draw_face(
    seed: int, index: int, variation: float
) -> tuple[int, Identity, Scene, FloatArray, Generator]:
    label = int(index) % len(LABELS)
    rng = Generator(np.random.PCG64([int(seed), int(index)]))
    identity, scene = draw(Identity, rng), draw(Scene, rng)
    distribution = draw_distribution(rng, label)
    if variation < 1:
        scene = scene.varied(variation)
        clear = np.eye(len(LABELS))[label]  # (7,), this expression alone and at its full strength
        distribution = clear + variation * (distribution - clear)
    return label, identity, scene, distribution, rng


# ---- Parameters: none of those that are fields ever sees the label


def draw_distribution(rng: Generator, label: int) -> FloatArray:
    """Draw a target whose argmax is ``label``; see the module's docstring for its meaning.

    Returns:
        float64 (7,), sums to one.
    """
    distribution = np.zeros(len(LABELS))
    blended = rng.random() < _BLEND_SHARE
    others = [other for other in range(1, len(LABELS)) if other != label]
    other = others[rng.integers(len(others))]
    if label == 0:
        distribution[other] = rng.uniform(0.1, 0.35) if blended else 0.0
    elif blended:
        # At least 0.6 of the total against 0.4, and Neutral has 0.15 at most: no ties.
        total, share = rng.uniform(0.85, 1.0), rng.uniform(0.6, 0.85)
        distribution[label], distribution[other] = total * share, total * (1 - share)
    else:
        distribution[label] = rng.uniform(0.7, 1.0)
    distribution[0] = 1.0 - distribution[1:].sum()
    return distribution


def action_unit_levels(distribution: npt.NDArray[np.floating]) -> dict[int, float]:
    """Level of every action unit, 0 to 1, of a face with this (7,) label distribution."""
    levels = {unit: 0.0 for units in ACTION_UNITS.values() for unit in units}
    for name, intensity in zip(LABELS, distribution.tolist(), strict=True):
        for unit in ACTION_UNITS[name]:
            levels[unit] += intensity
    return levels


def draw(kind: type[T], rng: Generator) -> T:
    """Draw each field of a class in turn, by what its declaration says."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{field.name: field.metadata["draw"](rng) for field in fields})


def _drawn(draw: Callable[[Generator], Any], middle: float | None = None) -> Any:
    """A field that is drawn so; ``middle`` of its range, where it has one."""
    return dataclasses.field(metadata={"draw": draw, "middle": middle})


def _between(low: float, high: float) -> Any:
    middle = (low + high) / 2
    return _drawn(lambda rng: rng.uniform(low, high), middle)


def _from(palette: Sequence[Colour]) -> Any:
    """A colour between two neighbours of the palette."""

    def pick(rng: Generator) -> Colour:
        position = rng.uniform(0, len(palette) - 1)
        low = int(position)
        return _mix(palette[low], palette[min(low + 1, len(palette) - 1)], position - low)

    return _drawn(pick)


def _any_colour() -> Any:
    return _drawn(lambda rng: _mix(rng.integers(40, 226, 3).tolist(), (128, 128, 128), 0.3))


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """``first`` with ``share`` of ``second`` in it."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


@dataclass(frozen=True)
class Identity:
    """Who the face is; lengths in face units (half the face's height), ``*_gain`` are factors."""

    skin: Colour = _from(_SKIN)
    hair: Colour = _from(_HAIR)
    iris: Colour = _from(_IRIS)
    clothes: Colour = _any_colour()
    hair_style: int = _drawn(lambda rng: int(rng.integers(4)))  # bald, plain, swept, long
    hairline: float = _between(-0.78, -0.66)
    glasses: bool = _drawn(lambda rng: rng.random() < 0.15)
    face_width: float = _between(0.70, 0.82)
    jaw: float = _between(0.10, 0.32)
    brow_y: float = _between(-0.37, -0.31)
    brow_tilt: float = _between(-0.02, 0.02)
    brow_thickness: float = _between(0.040, 0.060)
    eye_x: float = _between(0.29, 0.34)
    eye_gain: float = _between(0.9, 1.15)
    nose_gain: float = _between(0.85, 1.2)
    mouth_y: float = _between(0.53, 0.59)
    mouth_width: float = _between(0.25, 0.31)
    mouth_rest: float = _between(-0.015, 0.015)
    lip_gain: float = _between(0.75, 1.3)
    crease_gain: float = _between(0.6, 1.0)

    def shadow(self, strength: float) -> Colour:
        """The skin's colour in a fold of this strength, 0 to 1."""
        red, green, blue = self.skin
        return _mix(self.skin, (red * 2 // 5, green // 4, blue // 4), strength)


@dataclass(frozen=True)
class Scene:
    """How the face is seen: light, pose, background and sensor."""

    exposure: float = _between(0.70, 1.08)
    warmth: float = _between(-0.07, 0.07)  # more red, less blue
    rotation: float = _between(-0.25, 0.25)
    scale: float = _between(0.84, 1.1)
    right: float = _between(-0.09, 0.09)  # shares of the picture
    down: float = _between(-0.09, 0.09)
    yaw: float = _between(-0.12, 0.12)
    light_angle: float = _drawn(lambda rng: rng.uniform(-np.pi, np.pi))
    light_contrast: float = _between(0.05, 0.3)
    background: Colour = _any_colour()
    backdrop: Colour = _any_colour()
    backdrop_xyr: tuple[float, float, float] = _drawn(
        lambda rng: (rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.3, 0.7))
    )
    blur: float = _between(0.0, 0.005)
    noise: float = _between(1.0, 5.0)

    def varied(self, share: float) -> Scene:
        """The scene with only this share of its distance from the middle of every range."""
        middles = {field.name: field.metadata["middle"] for field in dataclasses.fields(self)}
        return dataclasses.replace(
            self,
            **{
                name: middle + share * (getattr(self, name) - middle)
                for name, middle in middles.items()
                if middle is not None
            },
        )


# ---- Geometry


@dataclass(frozen=True)
class Geometry:
    """Curves of a face in face units, x to the right, y down, the origin between the eyes.

    Arrays are float64 (points, 2). What comes in pairs is given for the side of positive x and is
    mirrored when drawn. A lip is its upper and its lower edge, from the left to the right corner.
    """

    outline: FloatArray
    brow: FloatArray
    upper_lid: FloatArray
    lower_lid: FloatArray
    iris: FloatArray
    pupil: FloatArray
    nose_wing: FloatArray
    nostril: FloatArray
    upper_lip: tuple[FloatArray, FloatArray]
    lower_lip: tuple[FloatArray, FloatArray]
    teeth: FloatArray
    creases: tuple[tuple[FloatArray, float], ...]  # curve, strength 0 to 1


def face_geometry(identity: Identity, units: Units) -> Geometry:
    """Curves of the face with its action units at the given levels.

    Args:
        identity: The person at rest.
        units: Level of every action unit that :data:`ACTION_UNITS` names, 0 to 1.
    """
    x, y = _CIRCLE.T
    below = np.maximum(y, 0)
    x = identity.face_width * np.sign(x) * np.abs(x) ** 0.85 * (1 - identity.jaw * below**2)
    outline = np.column_stack([x, y * (1 + 0.14 * units[26] * below)])  # AU 26: the chin sinks

    # AU 9 pulls the nose up and spreads it.
    width, base = identity.nose_gain * (0.14 + 0.04 * units[9]), 0.27 - 0.07 * units[9]
    wing = _bezier((width, base - 0.08), (width + 0.05, base + 0.06), (width * 0.55, base + 0.03))
    nostril = _CIRCLE * (0.04, 0.022) + (width * 0.5, base + 0.015)

    upper, lower = _lips(identity, units)
    # Teeth: the upper row under the upper lip, or the lower row that AU 16 bares.
    band = np.minimum(0.6 * np.maximum(lower[0] - upper[1], 0.0), (0.0, 0.06))
    lower_row = units[16] > units[26]
    rim, edge = (lower[0], lower[0] - band) if lower_row else (upper[1], upper[1] + band)
    teeth = np.concatenate([rim, edge[::-1]])

    creases = _creases(identity, units, wing[0], upper[0][-1])
    eye = _eye(identity, units)
    brow = _brow(identity, units)
    return Geometry(outline, brow, *eye, wing, nostril, upper, lower, teeth, creases)


def _brow(identity: Identity, units: Units) -> FloatArray:
    """A tapered arch: inner end, arch and outer end each follow their own units."""
    au = units
    lift = np.array([0.23 * au[1], 0.09 * au[1] + 0.09 * au[2], 0.14 * au[2]])
    # Where AU 1 works against it (sadness, fear), AU 4 draws the brows together, not down.
    lower = au[4] * (1 - 0.7 * au[1])
    sink = np.array([0.17 * lower + 0.05 * au[9], 0.09 * au[4] + 0.03 * au[9], 0.01 * au[4]])
    rest = np.array([0.02, -0.045, 0.03]) + identity.brow_tilt * np.array([1, 0, -1])
    y = identity.brow_y + rest + sink - lift
    x = identity.eye_x + np.array([-0.19 - 0.05 * au[4], 0.04, 0.22])  # AU 4 draws them together
    curve = _BEZIER @ np.column_stack([x, y])
    half = np.outer(np.linspace(1.0, 0.35, len(curve)), (0.0, identity.brow_thickness))
    return np.concatenate([curve - half, (curve + half)[::-1]])


def _eye(identity: Identity, units: Units) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Lids from inner to outer corner; iris and pupil, cut off where a lid covers them."""
    au, gain = units, identity.eye_gain
    above = gain * (0.085 + 0.075 * au[5] - 0.045 * au[7] - 0.025 * au[9] - 0.015 * au[6])
    below = gain * (0.055 + 0.010 * au[5] - 0.045 * au[7] - 0.025 * au[9] - 0.040 * au[6])
    x = identity.eye_x + 0.16 * gain * _ARC
    arch = (1 - _ARC**2) ** 0.8
    # AU 1 with AU 4 pulls the inner end of the upper lid up: the oblique lid of grief.
    slope = 0.05 * min(au[1], au[4]) * (1 - _ARC) * arch
    top, bottom = -above * arch - slope, below * arch

    def disc(radius: float) -> FloatArray:
        across, down = (radius * gain * _CIRCLE + (identity.eye_x, -0.012)).T
        down = np.maximum(down, np.interp(across, x, top))
        return np.column_stack([across, np.minimum(down, np.interp(across, x, bottom))])

    lids = np.column_stack([x, top]), np.column_stack([x, bottom])
    return *lids, disc(0.075), disc(0.036)


def _lips(
    identity: Identity, units: Units
) -> tuple[tuple[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]:
    au = units
    spread = 0.14 * au[12] + 0.17 * au[20] - 0.04 * au[15] - 0.09 * au[23] - 0.10 * au[26]
    x = (identity.mouth_width + spread) * _ARC
    corner = identity.mouth_rest - 0.18 * au[12] + 0.16 * au[15] + 0.05 * au[20] + 0.06 * au[26]
    middle = 0.05 * au[12] - 0.04 * au[15] - 0.08 * au[9]
    gap = 0.34 * au[26] - 0.08 * au[20] * au[26] + 0.12 * au[16]
    # Lips thin out when tightened (23) or drawn wide (12, 20).
    lip = identity.lip_gain * (1 - 0.7 * au[23] - 0.2 * au[12] - 0.35 * au[20])
    # One is a parabola; less is rounder, as an open mouth is, and boxy when it is drawn wide.
    bend = 1 - 0.45 * au[26] - 0.2 * au[20] - 0.4 * au[16]

    def edge(height: float, exponent: float) -> FloatArray:
        arch = (1 - _ARC**2) ** exponent
        return np.column_stack([x, identity.mouth_y + corner + (height - corner) * arch])

    upper = edge(middle - 0.06 * lip, 0.8 * bend), edge(middle, bend)
    lower = edge(middle + gap, bend), edge(middle + gap + 0.085 * lip, 0.8 * bend)
    return upper, lower


# Folds that a unit presses into the skin: unit, where the points count from, three points.
_CREASES: tuple[tuple[int, str, tuple[_Point, _Point, _Point]], ...] = (
    # Forehead: the middle for AU 1, the sides for AU 2; between the brows for AU 4.
    (1, "face", ((0.0, -0.60), (0.10, -0.61), (0.18, -0.59))),
    (2, "face", ((0.18, -0.60), (0.34, -0.64), (0.48, -0.57))),
    (4, "face", ((0.045, -0.36), (0.065, -0.28), (0.05, -0.20))),
    # AU 6: the raised cheek's edge and crow's feet; AU 7: the tense lid alone.
    (6, "eye", ((-0.16, 0.12), (0.0, 0.20), (0.20, 0.08))),
    (6, "eye", ((0.20, -0.02), (0.24, -0.04), (0.29, -0.08))),
    (6, "eye", ((0.20, 0.02), (0.25, 0.03), (0.30, 0.03))),
    (7, "eye", ((-0.13, 0.06), (0.0, 0.10), (0.14, 0.05))),
    # AU 9: across the bridge and beside it; AU 15: below the lip's corner.
    (9, "face", ((0.0, -0.10), (0.06, -0.09), (0.10, -0.14))),
    (9, "face", ((0.0, -0.02), (0.07, -0.01), (0.12, -0.06))),
    (9, "face", ((0.06, 0.08), (0.09, 0.04), (0.13, 0.03))),
    (15, "mouth", ((0.02, 0.0), (0.05, 0.05), (0.03, 0.11))),
)


def _creases(
    identity: Identity, units: Units, wing: FloatArray, corner: FloatArray
) -> tuple[tuple[FloatArray, float], ...]:
    """Folds with their strength; those that are deep enough to be seen."""
    origins = {"face": np.zeros(2), "eye": np.array([identity.eye_x, 0.0]), "mouth": corner}
    lines = [(units[unit], np.array(points) + origins[at]) for unit, at, points in _CREASES]
    # The nasolabial fold is there at rest, and deep in a smile and in disgust.
    fold = np.array([wing, (corner[0], wing[1]), corner])
    fold += ((0.03, 0.0), (0.10, 0.10), (0.07, 0.02))
    lines.append((0.12 + 0.88 * max(units[12], units[9]), fold))
    gain = identity.crease_gain
    return tuple((_BEZIER @ points, level * gain) for level, points in lines if level > 0.05)


def _bezier(*points: _Point) -> FloatArray:
    """Nine points of the quadratic curve from a start by a control point to an end."""
    curve: FloatArray = _BEZIER @ np.array(points)
    return curve


# ---- Paint and light


class _Canvas:
    """Draws curves given in face units onto a supersampled picture, in the scene's pose."""

    def __init__(self, scene: Scene, size: int) -> None:
        side = size * _SUPERSAMPLE
        self.image = Image.new("RGB", (side, side), scene.background)
        self._draw = ImageDraw.Draw(self.image)
        x, y, radius = scene.backdrop_xyr  # shares of the picture, outside the head's pose
        corners = [(x - radius) * side, (y - radius) * side]
        corners += [(x + radius) * side, (y + radius) * side]
        self._draw.ellipse(corners, fill=scene.backdrop)
        self._yaw = scene.yaw
        self._unit = _FACE_UNIT * scene.scale * side
        cosine, sine = math.cos(scene.rotation), math.sin(scene.rotation)
        self._pose = self._unit * np.array([[cosine, sine], [-sine, cosine]])
        self._centre = side * np.array([0.5 + scene.right, 0.52 + scene.down])

    def draw(
        self,
        points: FloatArray,
        colour: Colour,
        depth: float = 1.0,
        width: float = 0.0,
        twice: bool = False,
    ) -> None:
        """Fill a polygon or, with a width in face units, draw a line.

        Args:
            points: Float (points, 2).
            colour: Of the surface or the line.
            depth: How far before the head's axis it lies.
            width: Of the line.
            twice: Draw its mirror image too.
        """
        for side in (-1, 1) if twice else (1,):
            own = points * (side, 1)
            # Turning the head moves what lies near the middle of the face further than its rim.
            own[:, 0] += self._yaw * depth * (1 - own[:, 0] ** 2)
            placed = (own @ self._pose + self._centre).ravel().tolist()
            if width:
                self._draw.line(placed, fill=colour, width=max(1, round(width * self._unit)))
            else:
                self._draw.polygon(placed, fill=colour)


def _paint(face: Geometry, identity: Identity, scene: Scene, size: int) -> Image.Image:
    """Paint the portrait from back to front; PIL RGB of (size, size)."""
    canvas = _Canvas(scene, size)
    draw, shadow = canvas.draw, identity.shadow
    hair, width, line = identity.hair, identity.face_width, identity.hairline

    if identity.hair_style == 3:
        mane = _CIRCLE * (width * 1.28, 1.15)
        mane[:, 1] = np.where(mane[:, 1] > 0, mane[:, 1] * 1.15, mane[:, 1])
        draw(mane, hair, 0)
    draw(_NECK, shadow(0.3), 0)
    draw(_CIRCLE * (1.25, 0.55) + (0, 1.75), identity.clothes, 0)
    draw(_CIRCLE * (0.11, 0.19) + (width * 0.98, 0.05), shadow(0.15), 0, twice=True)

    draw(face.outline, shadow(0.2), 0)
    # The lit part, moved towards the light, leaves a rim of shade on the other side.
    light = np.array([math.cos(scene.light_angle), math.sin(scene.light_angle)])
    draw(face.outline * 0.955 + 0.03 * light, identity.skin, 0)
    for curve, strength in face.creases:
        draw(curve, shadow(0.75 * strength), width=0.028, twice=True)

    eye_white = np.concatenate([face.upper_lid, face.lower_lid[::-1]])
    draw(eye_white, (244, 242, 238), twice=True)
    draw(face.iris, identity.iris, twice=True)
    draw(face.pupil, (14, 12, 12), twice=True)
    draw(face.lower_lid, shadow(0.6), width=0.02, twice=True)
    draw(face.upper_lid, shadow(1.0), width=0.04, twice=True)
    # Brows stay visible on every head: the hair's colour, darkened away from the skin's.
    draw(face.brow, _mix(hair, (20, 14, 10), 0.45), twice=True)
    draw(face.nostril, shadow(0.9), 1.3, twice=True)
    draw(face.nose_wing, shadow(0.55), 1.3, width=0.03, twice=True)

    (top, upper_inner), (lower_inner, bottom) = face.upper_lip, face.lower_lip
    lips = _mix(shadow(0.35), (178, 52, 62), 0.5)
    draw(np.concatenate([upper_inner, lower_inner[::-1]]), (58, 18, 24))
    draw(face.teeth, (236, 232, 224))
    draw(np.concatenate([top, upper_inner[::-1]]), _mix(lips, (60, 20, 24), 0.2))
    draw(np.concatenate([lower_inner, bottom[::-1]]), lips)
    draw(upper_inner, _mix(lips, (40, 12, 16), 0.75), width=0.024)

    if identity.hair_style > 0:
        part = 0.45 if identity.hair_style == 2 else 0.0
        right, left = [(0.93, -0.25), (0.8, line + 0.12)], [(-0.8, line + 0.12), (-0.93, -0.25)]
        hairline = np.array([*right, (part, line - 0.06), *left]) * (width, 1)
        draw(np.concatenate([_SKULL * (1.06 * width, 1.1), hairline]), hair, 0)
    if identity.glasses:
        frame, x = (36, 32, 34), identity.eye_x
        rim = np.concatenate([_CIRCLE, _CIRCLE[:1]]) * (0.235, 0.2)
        for side in (-1, 1):
            draw(np.array([side * x, 0.01]) + rim, frame, width=0.03)
        draw(_bezier((0.23 - x, 0.0), (0, -0.05), (x - 0.23, 0.0)), frame, width=0.03)
    picture = canvas.image.reduce(_SUPERSAMPLE)
    return picture.filter(ImageFilter.BoxBlur(scene.blur * size))


def _light(picture: Image.Image, scene: Scene, rng: Generator) -> npt.NDArray[np.uint8]:
    """Apply exposure, white balance, a gradient of light and sensor noise; uint8 (H, W, 3)."""
    ramp = np.linspace(-1, 1, picture.width, dtype=np.float32)
    across = scene.light_contrast * math.cos(scene.light_angle)
    down = scene.light_contrast * math.sin(scene.light_angle)
    gradient = 1 + across * ramp + down * ramp[:, None]  # (H, W)
    lit = np.asarray(picture, dtype=np.float32) * gradient[..., None]  # (H, W, 3)
    balance = np.array([1 + scene.warmth, 1, 1 - scene.warmth])
    lit *= (scene.exposure * balance).astype(np.float32)
    # Noise of brightness alone, as cameras leave it after smoothing the colours.
    lit += scene.noise * rng.standard_normal((*gradient.shape, 1), dtype=np.float32)
    image: npt.NDArray[np.uint8] = np.clip(np.rint(lit), 0, 255).astype(np.uint8)
    return image
