"""Draw what was found into a copy of the picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from efficientface_deploy.predictor import FacePrediction

_COLOUR = (255, 220, 0)  # seen on skin and on most backgrounds
_INK = (0, 0, 0)


def draw_faces(image: Image.Image, faces: Sequence[FacePrediction]) -> Image.Image:
    """A copy of a picture with a box and a label for every face.

    Args:
        image: PIL image of mode RGB.
        faces: As :meth:`Predictor.predict_faces` returns them.
    """
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    side = max(image.size)
    line = max(1, side // 300)
    font = ImageFont.load_default(size=max(10, side // 40))
    for found in faces:
        left, top, right, bottom = found.face.box
        # Within the picture, so that the whole picture's box and its label can be seen.
        left, top = max(0.0, left), max(0.0, top)
        right, bottom = min(image.width - 1.0, right), min(image.height - 1.0, bottom)
        if left >= right or top >= bottom:
            continue
        draw.rectangle((left, top, right, bottom), outline=_COLOUR, width=line)
        text = f"{found.prediction.label} {found.prediction.confidence:.2f}"
        draw.rectangle(draw.textbbox((left, top), text, font), fill=_COLOUR)
        draw.text((left, top), text, _INK, font)
    return copy
