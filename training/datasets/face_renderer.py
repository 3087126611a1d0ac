"""Synthetic faces with known label distributions, for ``make demo`` and the tests.

A cartoon portrait whose brows, lids, nose and mouth are moved by facial action units (Ekman and
Friesen's FACS). Reading order: draw the parameters, move the geometry, rasterise, light.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

LABELS: tuple[str, ...] = (
    "Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger",
)  # fmt: skip

ACTION_UNITS: dict[str, tuple[int, ...]] = {
    "Neutral": (),
    "Happiness": (6, 12),
    "Sadness": (1, 4, 15),
    "Surprise": (1, 2, 5, 26),
    "Fear": (1, 2, 4, 5, 20, 26),
    "Disgust": (9, 15, 16),
    "Anger": (4, 5, 7, 23),
}

BLEND_SHARE = 0.28
MIN_SIZE, MAX_SIZE = 32, 1024

FloatArray = npt.NDArray[np.float64]
Colour = tuple[int, int, int]
Units = Mapping[int, float]
_Point = tuple[float, float]

# Drawing at three times the size and averaging is what makes the edges smooth: Pillow's polygons
# are not antialiased.
_SUPERSAMPLE = 3

# Half the face's height as a share of the picture's, at scale one: the face fills the picture, as
# it does in RAF-DB's aligned crops.
_FACE_UNIT = 0.46

_SKIN: tuple[Colour, ...] = (
    (250, 224, 205), (240, 200, 172), (224, 178, 142), (198, 148, 112), (165, 114, 80),
    (128, 84, 58), (96, 62, 44),
)  # fmt: skip
_HAIR: tuple[Colour, ...] = (
    (32, 26, 24), (62, 42, 32), (104, 68, 42), (150, 104, 58), (206, 168, 104), (150, 70, 40),
    (158, 156, 156),
)  # fmt: skip
_IRIS: tuple[Colour, ...] = ((70, 44, 28), (96, 66, 36), (64, 96, 130), (74, 104, 70))

# Curves that everything is made of, computed once: rendering is mostly small array operations.
_ARC = np.linspace(-1.0, 1.0, 17)
_CIRCLE = np.array([(np.sin(a), -np.cos(a)) for a in np.linspace(0, 2 * np.pi, 33)[:-1]])
_SKULL = np.array([(np.sin(a), -np.cos(a)) for a in np.linspace(-1.75, 1.75, 25)])
_BEZIER = np.array([((1 - t) ** 2, 2 * t * (1 - t), t**2) for t in np.linspace(0, 1, 9)])


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


@dataclass(frozen=True)
class Identity:
    """Who the face is; lengths in face units (half the face's height), ``*_gain`` are factors."""

    skin: Colour
    hair: Colour
    iris: Colour
    clothes: Colour
    hair_style: int
    hairline: float
    glasses: bool
    face_width: float
    jaw: float
    brow_y: float
    brow_tilt: float
    brow_thickness: float
    eye_x: float
    eye_gain: float
    nose_gain: float
    mouth_y: float
    mouth_width: float
    mouth_rest: float
    lip_gain: float
    crease_gain: float


@dataclass(frozen=True)
class Scene:
    """How the face is seen: pose, light, background and sensor."""

    rotation: float
    scale: float
    shift: tuple[float, float]
    yaw: float
    light_angle: float
    light_contrast: float
    exposure: tuple[float, float, float]
    background: Colour
    backdrop: Colour
    backdrop_xyr: tuple[float, float, float]
    blur: float
    noise: float


@dataclass(frozen=True)
class Geometry:
    """Curves of a face in face units, x to the right, y down, the origin between the eyes.

    Arrays are float64 (points, 2). What comes in pairs is given for the side of positive x and is
    mirrored when drawn.
    """

    outline: FloatArray
    brow: FloatArray
    upper_lid: FloatArray
    lower_lid: FloatArray
    iris: FloatArray
    pupil: FloatArray
    nose_wing: FloatArray
    nostril: FloatArray
    upper_lip: tuple[FloatArray, FloatArray]  # its upper and its lower edge
    lower_lip: tuple[FloatArray, FloatArray]
    teeth: FloatArray
    creases: tuple[tuple[FloatArray, float], ...]  # curve, strength 0 to 1


def render_face(seed: int, index: int, size: int = 100) -> SyntheticFace:
    """Render face number ``index`` of the collection ``seed``.

    The same arguments give the same bits in any order and process (of the same NumPy and Pillow);
    another ``size`` gives the same face at another resolution. The label is ``index % 7``, so every
    run of seven is balanced.

    Args:
        seed: Names the collection, 0 or more. Use different seeds for training and test.
        index: Number of the face in it, 0 or more.
        size: Height and width in pixels, 32 to 1024.

    Raises:
        ValueError: An argument is not an integer or is out of range.
    """
    _require_integer("seed", seed, 0)
    _require_integer("index", index, 0)
    _require_integer("size", size, MIN_SIZE, MAX_SIZE)
    label = int(index) % len(LABELS)
    rng = np.random.Generator(np.random.PCG64([int(seed), int(index)]))
    # The noise is drawn last: its amount depends on the size, the face must not.
    identity, scene = draw_identity(rng), draw_scene(rng)
    distribution = draw_distribution(rng, label)
    geometry = face_geometry(identity, action_unit_levels(distribution))
    picture = _rasterise(geometry, identity, scene, int(size))
    image = _light(picture, scene, rng)
    return SyntheticFace(image, distribution.astype(np.float32), label)


def contact_sheet(seed: int, columns: int = 10, size: int = 100) -> Image.Image:
    """A PIL RGB picture with one row per label, in the order of :data:`LABELS`."""
    rows = len(LABELS)
    sheet = Image.new("RGB", (columns * size, rows * size))
    for index in range(rows * columns):
        face = Image.fromarray(render_face(seed, index, size).image)
        sheet.paste(face, (index // rows * size, index % rows * size))
    return sheet


def _require_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    wanted = f"an integer of {low} or more" if high is None else f"an integer from {low} to {high}"
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise ValueError(f"{name}: expected {wanted}, found {value!r}")


# ---- Parameters --------------------------------------------------------------------------------


def draw_distribution(rng: np.random.Generator, label: int) -> FloatArray:
    """Draw a target whose argmax is ``label``; see the module's docstring for its meaning.

    Args:
        rng: Source of randomness.
        label: Index into :data:`LABELS`.

    Returns:
        float64 (7,), sums to one.
    """
    distribution = np.zeros(len(LABELS))
    blended = rng.random() < BLEND_SHARE
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


def draw_identity(rng: np.random.Generator) -> Identity:
    """Draw a person; never sees the label."""
    skin = _pick(rng, _SKIN)
    return Identity(
        skin=skin,
        hair=_pick(rng, _HAIR),
        iris=_pick(rng, _IRIS),
        clothes=_random_colour(rng),
        hair_style=int(rng.integers(4)),
        hairline=rng.uniform(-0.78, -0.66),
        glasses=rng.random() < 0.15,
        face_width=rng.uniform(0.70, 0.82),
        jaw=rng.uniform(0.10, 0.32),
        brow_y=rng.uniform(-0.37, -0.31),
        brow_tilt=rng.uniform(-0.02, 0.02),
        brow_thickness=rng.uniform(0.040, 0.060),
        eye_x=rng.uniform(0.29, 0.34),
        eye_gain=rng.uniform(0.9, 1.15),
        nose_gain=rng.uniform(0.85, 1.2),
        mouth_y=rng.uniform(0.53, 0.59),
        mouth_width=rng.uniform(0.25, 0.31),
        mouth_rest=rng.uniform(-0.015, 0.015),
        lip_gain=rng.uniform(0.75, 1.3),
        crease_gain=rng.uniform(0.6, 1.0),
    )


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw pose, light, background and sensor; never sees the label."""
    gain = rng.uniform(0.70, 1.08)
    warmth = rng.uniform(-0.07, 0.07)
    return Scene(
        rotation=rng.uniform(-0.25, 0.25),
        scale=rng.uniform(0.84, 1.1),
        shift=(rng.uniform(-0.09, 0.09), rng.uniform(-0.09, 0.09)),
        yaw=rng.uniform(-0.12, 0.12),
        light_angle=rng.uniform(-np.pi, np.pi),
        light_contrast=rng.uniform(0.05, 0.3),
        exposure=(gain * (1 + warmth), gain, gain * (1 - warmth)),
        background=_random_colour(rng),
        backdrop=_random_colour(rng),
        backdrop_xyr=(rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.3, 0.7)),
        blur=rng.uniform(0.0, 0.005),
        noise=rng.uniform(1.0, 5.0),
    )


def _pick(rng: np.random.Generator, palette: Sequence[Colour]) -> Colour:
    """A colour between two neighbours of the palette."""
    position = rng.uniform(0, len(palette) - 1)
    low = int(position)
    return _mix(palette[low], palette[min(low + 1, len(palette) - 1)], position - low)


def _random_colour(rng: np.random.Generator) -> Colour:
    red, green, blue = rng.integers(40, 226, 3).tolist()
    return _mix((red, green, blue), (128, 128, 128), 0.3)


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """``first`` with ``share`` of ``second`` in it."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


# ---- Geometry ----------------------------------------------------------------------------------


def face_geometry(identity: Identity, units: Units) -> Geometry:
    """Curves of the face with its action units at the given levels.

    Args:
        identity: The person at rest.
        units: Level of every action unit that :data:`ACTION_UNITS` names, 0 to 1.
    """
    upper_lid, lower_lid, iris, pupil = _eye(identity, units)
    wing, nostril = _nose(identity, units)
    upper_lip, lower_lip = _mouth(identity, units)
    corner = upper_lip[0][-1]
    return Geometry(
        outline=_outline(identity, units),
        brow=_brow(identity, units),
        upper_lid=upper_lid,
        lower_lid=lower_lid,
        iris=iris,
        pupil=pupil,
        nose_wing=wing,
        nostril=nostril,
        upper_lip=upper_lip,
        lower_lip=lower_lip,
        teeth=_teeth(upper_lip[1], lower_lip[0], units),
        creases=_creases(identity, units, wing[0], corner),
    )


def _outline(identity: Identity, units: Units) -> FloatArray:
    x, y = _CIRCLE.T
    below = np.maximum(y, 0)
    x = identity.face_width * np.sign(x) * np.abs(x) ** 0.85 * (1 - identity.jaw * below**2)
    return np.column_stack([x, y * (1 + 0.14 * units[26] * below)])  # AU 26: the chin sinks


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


def _nose(identity: Identity, units: Units) -> tuple[FloatArray, FloatArray]:
    """The wing, from its upper end, and the nostril; AU 9 pulls both up and spreads them."""
    width = identity.nose_gain * (0.14 + 0.04 * units[9])
    base = 0.27 - 0.07 * units[9]
    wing = _bezier((width, base - 0.08), (width + 0.05, base + 0.06), (width * 0.55, base + 0.03))
    nostril = _CIRCLE * (0.04, 0.022) + (width * 0.5, base + 0.015)
    return wing, nostril


def _mouth(
    identity: Identity, units: Units
) -> tuple[tuple[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]:
    """Upper and lower lip, each as its upper and lower edge, from the left to the right corner."""
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

    upper = (edge(middle - 0.06 * lip, 0.8 * bend), edge(middle, bend))
    lower = (edge(middle + gap, bend), edge(middle + gap + 0.085 * lip, 0.8 * bend))
    return upper, lower


def _teeth(upper: FloatArray, lower: FloatArray, units: Units) -> FloatArray:
    """The upper row under the upper lip, or the lower row that AU 16 bares."""
    opening = np.maximum(lower - upper, 0.0)
    band = np.minimum(0.6 * opening, (0.0, 0.06))
    rim, edge = (lower, lower - band) if units[16] > units[26] else (upper, upper + band)
    return np.concatenate([rim, edge[::-1]])


def _creases(
    identity: Identity, units: Units, wing: FloatArray, corner: FloatArray
) -> tuple[tuple[FloatArray, float], ...]:
    """Folds that the units press into the skin, with their strength."""
    au, eye = units, identity.eye_x
    (wing_x, wing_y), (corner_x, corner_y) = wing.tolist(), corner.tolist()
    lines: list[tuple[float, tuple[_Point, _Point, _Point]]] = [
        # Forehead: the middle for AU 1, the sides for AU 2; between the brows for AU 4.
        (au[1], ((0.0, -0.60), (0.10, -0.61), (0.18, -0.59))),
        (au[2], ((0.18, -0.60), (0.34, -0.64), (0.48, -0.57))),
        (au[4], ((0.045, -0.36), (0.065, -0.28), (0.05, -0.20))),
        # AU 6: the raised cheek's edge and crow's feet; AU 7: the tense lid alone.
        (au[6], ((eye - 0.16, 0.12), (eye, 0.20), (eye + 0.20, 0.08))),
        (au[6], ((eye + 0.20, -0.02), (eye + 0.24, -0.04), (eye + 0.29, -0.08))),
        (au[6], ((eye + 0.20, 0.02), (eye + 0.25, 0.03), (eye + 0.30, 0.03))),
        (au[7], ((eye - 0.13, 0.06), (eye, 0.10), (eye + 0.14, 0.05))),
        # AU 9: across the bridge and beside it.
        (au[9], ((0.0, -0.10), (0.06, -0.09), (0.10, -0.14))),
        (au[9], ((0.0, -0.02), (0.07, -0.01), (0.12, -0.06))),
        (au[9], ((0.06, 0.08), (0.09, 0.04), (0.13, 0.03))),
        # AU 15: below the lip's corner.
        (au[15], ((corner_x + 0.02, corner_y), (corner_x + 0.05, corner_y + 0.05),
                  (corner_x + 0.03, corner_y + 0.11))),
        # The nasolabial fold: there at rest, deep in a smile and in disgust.
        (0.12 + 0.88 * max(au[12], au[9]),
         ((wing_x + 0.03, wing_y), (corner_x + 0.10, wing_y + 0.10),
          (corner_x + 0.07, corner_y + 0.02))),
    ]  # fmt: skip
    return tuple(
        (_bezier(*points), strength * identity.crease_gain)
        for strength, points in lines
        if strength > 0.05
    )


def _bezier(start: _Point, control: _Point, end: _Point) -> FloatArray:
    """Nine points of the quadratic curve."""
    curve: FloatArray = _BEZIER @ np.array([start, control, end])
    return curve


# ---- Raster ------------------------------------------------------------------------------------


class _Canvas:
    """Draws curves given in face units onto a supersampled picture, in the scene's pose."""

    def __init__(self, scene: Scene, size: int) -> None:
        side = size * _SUPERSAMPLE
        self.side = side
        self.image = Image.new("RGB", (side, side), scene.background)
        self.unit = _FACE_UNIT * scene.scale * side
        self._yaw = scene.yaw
        self._draw = ImageDraw.Draw(self.image)
        cosine, sine = math.cos(scene.rotation), math.sin(scene.rotation)
        self._pose = self.unit * np.array([[cosine, sine], [-sine, cosine]])
        self._centre = side * (np.array([0.5, 0.52]) + scene.shift)

    def fill(self, points: FloatArray, colour: Colour, depth: float = 0.0) -> None:
        """Fill a polygon; ``depth`` says how far before the head's axis it lies."""
        self._draw.polygon(self._place(points, depth), fill=colour)

    def stroke(self, points: FloatArray, colour: Colour, width: float, depth: float = 1.0) -> None:
        """Draw a line of ``width`` face units."""
        pixels = max(1, round(width * self.unit))
        self._draw.line(self._place(points, depth), fill=colour, width=pixels)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Fill a circle given in shares of the picture, outside the head's pose."""
        corners = [(x - radius) * self.side, (y - radius) * self.side,
                   (x + radius) * self.side, (y + radius) * self.side]  # fmt: skip
        self._draw.ellipse(corners, fill=colour)

    def _place(self, points: FloatArray, depth: float) -> list[float]:
        if depth:
            # Turning the head moves what lies near the middle of the face further than its rim.
            points = points.copy()
            points[:, 0] += self._yaw * depth * (1 - points[:, 0] ** 2)
        placed: list[float] = (points @ self._pose + self._centre).ravel().tolist()
        return placed


def _rasterise(face: Geometry, identity: Identity, scene: Scene, size: int) -> Image.Image:
    """Paint the portrait from back to front; PIL RGB of (size, size)."""
    canvas = _Canvas(scene, size)
    canvas.disc(*scene.backdrop_xyr, scene.backdrop)
    _paint_behind(canvas, identity)
    _paint_skin(canvas, face, identity, scene)
    for side in (-1, 1):
        mirror = np.array([side, 1])
        _paint_eye(canvas, face, identity, mirror)
        _paint_nose(canvas, face, identity, mirror)
    _paint_mouth(canvas, face, identity)
    _paint_hair(canvas, face, identity)
    if identity.glasses:
        _paint_glasses(canvas, identity)
    picture = canvas.image.reduce(_SUPERSAMPLE)
    return picture.filter(ImageFilter.BoxBlur(scene.blur * size))


def _shadow(identity: Identity, strength: float) -> Colour:
    """The skin's colour in a fold of this strength."""
    red, green, blue = identity.skin
    return _mix(identity.skin, (red * 2 // 5, green // 4, blue // 4), strength)


def _paint_behind(canvas: _Canvas, identity: Identity) -> None:
    width = identity.face_width
    if identity.hair_style == 3:  # long
        mane = _CIRCLE * (width * 1.28, 1.15)
        mane[:, 1] = np.where(mane[:, 1] > 0, mane[:, 1] * 1.15, mane[:, 1])
        canvas.fill(mane, identity.hair)
    neck = np.array([(-0.36, 0.5), (0.36, 0.5), (0.42, 1.6), (-0.42, 1.6)])
    canvas.fill(neck, _shadow(identity, 0.3))
    canvas.fill(_CIRCLE * (1.25, 0.55) + (0, 1.75), identity.clothes)
    for side in (-1, 1):
        ear = np.array([side * width * 0.98, 0.05]) + _CIRCLE * (0.11, 0.19)
        canvas.fill(ear, _shadow(identity, 0.15))


def _paint_skin(canvas: _Canvas, face: Geometry, identity: Identity, scene: Scene) -> None:
    canvas.fill(face.outline, _shadow(identity, 0.2))
    # The lit part, moved towards the light, leaves a rim of shade on the other side.
    light = np.array([math.cos(scene.light_angle), math.sin(scene.light_angle)])
    canvas.fill(face.outline * 0.955 + 0.03 * light, identity.skin)
    for curve, strength in face.creases:
        for side in (-1, 1):
            canvas.stroke(curve * (side, 1), _shadow(identity, 0.75 * strength), 0.028)


def _paint_eye(
    canvas: _Canvas, face: Geometry, identity: Identity, mirror: npt.NDArray[np.int_]
) -> None:
    upper, lower = face.upper_lid * mirror, face.lower_lid * mirror
    canvas.fill(np.concatenate([upper, lower[::-1]]), (244, 242, 238), 1.0)
    canvas.fill(face.iris * mirror, identity.iris, 1.0)
    canvas.fill(face.pupil * mirror, (14, 12, 12), 1.0)
    canvas.stroke(lower, _shadow(identity, 0.6), 0.02)
    canvas.stroke(upper, _shadow(identity, 1.0), 0.04)
    # Brows stay visible on every head: the hair's colour, darkened away from the skin's.
    canvas.fill(face.brow * mirror, _mix(identity.hair, (20, 14, 10), 0.45), 1.0)


def _paint_nose(
    canvas: _Canvas, face: Geometry, identity: Identity, mirror: npt.NDArray[np.int_]
) -> None:
    canvas.fill(face.nostril * mirror, _shadow(identity, 0.9), 1.3)
    canvas.stroke(face.nose_wing * mirror, _shadow(identity, 0.55), 0.03, 1.3)


def _paint_mouth(canvas: _Canvas, face: Geometry, identity: Identity) -> None:
    (top, upper_inner), (lower_inner, bottom) = face.upper_lip, face.lower_lip
    lips = _mix(_shadow(identity, 0.35), (178, 52, 62), 0.5)
    canvas.fill(np.concatenate([upper_inner, lower_inner[::-1]]), (58, 18, 24), 1.0)
    canvas.fill(face.teeth, (236, 232, 224), 1.0)
    canvas.fill(np.concatenate([top, upper_inner[::-1]]), _mix(lips, (60, 20, 24), 0.2), 1.0)
    canvas.fill(np.concatenate([lower_inner, bottom[::-1]]), lips, 1.0)
    canvas.stroke(upper_inner, _mix(lips, (40, 12, 16), 0.75), 0.024)


def _paint_hair(canvas: _Canvas, face: Geometry, identity: Identity) -> None:
    if identity.hair_style == 0:  # bald
        return
    width, line = identity.face_width, identity.hairline
    cap = _SKULL * (1.06 * width, 1.1)
    part = 0.45 if identity.hair_style == 2 else 0.0  # swept to one side
    hairline = [(0.93 * width, -0.25), (0.8 * width, line + 0.12), (part * width, line - 0.06),
                (-0.8 * width, line + 0.12), (-0.93 * width, -0.25)]  # fmt: skip
    canvas.fill(np.concatenate([cap, np.array(hairline)]), identity.hair)


def _paint_glasses(canvas: _Canvas, identity: Identity) -> None:
    rim = np.concatenate([_CIRCLE, _CIRCLE[:1]]) * (0.235, 0.2)
    for side in (-1, 1):
        canvas.stroke(np.array([side * identity.eye_x, 0.01]) + rim, (36, 32, 34), 0.03)
    bridge = _bezier((-identity.eye_x + 0.23, 0.0), (0, -0.05), (identity.eye_x - 0.23, 0.0))
    canvas.stroke(bridge, (36, 32, 34), 0.03)


# ---- Light -------------------------------------------------------------------------------------


def _light(picture: Image.Image, scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Apply exposure, white balance, a gradient of light and sensor noise; uint8 (H, W, 3)."""
    ramp = np.linspace(-1, 1, picture.width, dtype=np.float32)
    across = scene.light_contrast * math.cos(scene.light_angle)
    down = scene.light_contrast * math.sin(scene.light_angle)
    gradient = 1 + across * ramp + down * ramp[:, None]
    lit = np.asarray(picture, dtype=np.float32) * gradient[..., None]
    lit *= np.array(scene.exposure, dtype=np.float32)
    # Noise of brightness alone, as cameras leave it after smoothing the colours.
    lit += scene.noise * rng.standard_normal((*gradient.shape, 1), dtype=np.float32)
    image: npt.NDArray[np.uint8] = np.clip(np.rint(lit), 0, 255).astype(np.uint8)
    return image
