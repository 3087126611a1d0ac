"""Colour profiles: pictures of other colour spaces to sRGB, which models are trained on.

LittleCMS does it, by Pillow's ``ImageCms``. A profile that says sRGB, as most do, costs nothing
once it is known; one that cannot be applied is left out, and the log says so.
"""

from __future__ import annotations

import functools
import io
import logging
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from efficientface_deploy.errors import words_of

if TYPE_CHECKING:
    from PIL import ImageCms

_log = logging.getLogger(__name__)

_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # a picture's mode: its profile's space
_VISIBLE = 3  # of 255: profiles of sRGB by different makers are that near
_LARGEST = 8 << 20  # bytes; printers' profiles have up to three million


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture's colours in sRGB, by its profile.

    Args:
        image: Of mode RGB, L or CMYK.
        profile: An ICC profile.

    Returns:
        A new picture of mode RGB; the same one where the profile says sRGB (or, of grey, its
        curve), is of another kind of picture, or cannot be applied.
    """
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    result = transform.apply(image)
    result.info = {}  # it still names a profile
    return result


@functools.lru_cache(maxsize=8)  # the pictures of one camera or data set have one profile
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings a mode to sRGB; None where there is nothing to do."""
    try:
        from PIL import ImageCms  # here, since few pictures need it

        if len(profile) > _LARGEST:
            raise ValueError(f"{len(profile):,} bytes")
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = own.profile.xcolor_space.strip()
        if space != _SPACES[mode]:  # left in a picture that was converted without it
            raise ValueError(f"of {space}, in a picture of {_SPACES[mode]}")
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK" and _changes_little(transform, mode):
            return None
    except Exception as error:  # noqa: BLE001 - a decoder of foreign bytes, which may be missing
        _log.warning("a colour profile is not applied: %s", words_of(error))
        return None
    return transform


def _changes_little(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    sample = Image.fromarray(grid if mode == "RGB" else levels[None])
    before, after = (np.asarray(i.convert("RGB"), int) for i in (sample, transform.apply(sample)))
    return bool(np.abs(after - before).max() <= _VISIBLE)
