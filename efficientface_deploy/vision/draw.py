"""Draw what was found into a copy of the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from efficientface_deploy.vision.faces import Face

# One for each track in turn, light enough for black letters; the first is seen on skin and on most
# backgrounds. A palette for the colour-blind: Okabe and Ito's, without black, and lighter.
_COLOURS = (
    (255, 220, 0),
    (86, 180, 233),
    (255, 165, 60),
    (90, 215, 160),
    (235, 150, 200),
    (240, 240, 240),
    (120, 160, 255),
)
_INK = (0, 0, 0)

_SMALLEST_FONT = 8  # pixels

Box = tuple[int, int, int, int]


def draw_faces(image: Image.Image, faces: Iterable[tuple[Face, str, int | None]]) -> Image.Image:
    """A copy of a picture with a box for every face, and a text beside it.

    Args:
        image: PIL image of mode RGB.
        faces: Each face with its text and its track, which has a colour and is written before the
            text; None for a face without.
    """
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    line = max(1, max(image.size) // 300)
    shown = []
    for face, text, track in faces:
        if box := _within(face.box, image.size):
            colour = _COLOURS[(track or 1) % len(_COLOURS) - 1]
            shown.append((box, text if track is None else f"{track} {text}", colour))
    for box, _, colour in shown:
        draw.rectangle(box, outline=colour, width=line)
    taken = [box for box, _, _ in shown]
    for box, text, colour in shown:
        font = _font_for(draw, text, image.width)
        left, top, right, bottom = draw.textbbox((0, 0), text, font)
        pad = line + 1
        size = (round(right - left) + 2 * pad, round(bottom - top) + 2 * pad)
        place = _place_for(box, size, image.size, taken)
        draw.rectangle((*place, place[0] + size[0] - 1, place[1] + size[1] - 1), fill=colour)
        draw.text((place[0] + pad - left, place[1] + pad - top), text, _INK, font)
        taken.append((*place, place[0] + size[0], place[1] + size[1]))
    return copy


def _within(box: tuple[float, float, float, float], size: tuple[int, int]) -> Box | None:
    """What of a box is in a picture of a width and height, in whole pixels; None for nothing."""
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(size[0] - 1, math.ceil(box[2])), min(size[1] - 1, math.ceil(box[3]))
    return (left, top, right, bottom) if left < right and top < bottom else None


def _font_for(
    draw: ImageDraw.ImageDraw, text: str, width: int
) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """One whose letters can be read, smaller where the text would not fit into the picture."""
    size = max(12, width // 45)
    font = ImageFont.load_default(size)
    length = draw.textlength(text, font)
    if length > width - 4:
        font = ImageFont.load_default(max(_SMALLEST_FONT, int(size * (width - 4) / length)))
    return font


def _place_for(
    box: Box, size: tuple[int, int], picture: tuple[int, int], taken: Sequence[Box]
) -> tuple[int, int]:
    """Where a text of a width and height hides least: above its box, below it, beside it, or in it.

    Returns:
        Its left and top, such that it lies within the picture.
    """
    left, top, right, bottom = box
    width, height = size
    places = [
        (left, top - height),
        (left, bottom + 1),
        (right + 1, top),
        (left - width, top),
        (left, bottom - height),
    ]
    most = max(0, picture[0] - width), max(0, picture[1] - height)
    inside = [(min(max(0, x), most[0]), min(max(0, y), most[1])) for x, y in places]

    def hidden(place: tuple[int, int]) -> int:
        text = (*place, place[0] + width, place[1] + height)
        return sum(_overlap(text, other) for other in taken)

    return min(inside, key=hidden)


def _overlap(one: Box, other: Box) -> int:
    """The area that two boxes share, in pixels."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)
