"""Draw what was found into a copy of the picture."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from efficientface_deploy.vision.faces import Face

_COLOUR = (255, 220, 0)  # seen on skin and on most backgrounds
_INK = (0, 0, 0)


def draw_faces(image: Image.Image, faces: Iterable[tuple[Face, str]]) -> Image.Image:
    """A copy of a picture with a box and a text for every face.

    Args:
        image: PIL image of mode RGB.
        faces: Each face with its text.
    """
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    side = max(image.size)
    line = max(1, side // 300)
    font = ImageFont.load_default(size=max(10, side // 40))
    for face, text in faces:
        left, top, right, bottom = face.box
        # Within the picture, so that the whole picture's box and its label can be seen.
        left, top = max(0.0, left), max(0.0, top)
        right, bottom = min(image.width - 1.0, right), min(image.height - 1.0, bottom)
        if left >= right or top >= bottom:
            continue
        draw.rectangle((left, top, right, bottom), outline=_COLOUR, width=line)
        draw.rectangle(draw.textbbox((left, top), text, font), fill=_COLOUR)
        draw.text((left, top), text, _INK, font)
    return copy
