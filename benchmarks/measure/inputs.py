"""What is timed: batches and pictures."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from efficientface_deploy.vision.preprocess import UInt8Array
from efficientface_deploy.workbench.environment import l2_bytes, last_level_cache_bytes

PHOTOS = 16
PHOTO_SIDE = 224  # pixels, about what a face measures in a picture of 1 megapixel
JPEG_QUALITY = 90

_LARGEST_INPUTS = 64 << 20  # bytes; some servers' caches are as large as a phone's memory


def make_batches(side: int, batch: int, seed: int, count: int | None = None) -> list[UInt8Array]:
    """Different inputs of noise: what the pixels show does not change a network's arithmetic.

    Args:
        side: Side S of the model's input, pixels.
        batch: Images N in each.
        seed: Of the noise.
        count: How many; None for as many as are together twice as large as the last-level cache,
            or 64 MiB, and at least four. A single input, used again and again, would be found in
            the cache as no camera's frame is.

    Returns:
        Arrays, uint8 (N, S, S, 3).
    """
    count = count or max(4, math.ceil(input_bytes() / (batch * side * side * 3)))
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, size=(count, batch, side, side, 3), dtype=np.uint8))


def input_bytes() -> int:
    """How much one set of inputs holds at least."""
    return max(2 * l2_bytes(), min(2 * last_level_cache_bytes(), _LARGEST_INPUTS))


def make_jpegs(seed: int, size: tuple[int, int] = (PHOTO_SIDE, PHOTO_SIDE)) -> list[bytes]:
    """JPEG files in memory, smooth with a little noise: about a photograph's work to decode.

    Args:
        seed: Of what they show.
        size: Width W and height H, pixels.
    """
    rng = np.random.default_rng(seed)
    return [_make_jpeg(rng, size) for _ in range(PHOTOS)]


def _make_jpeg(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    coarse = rng.integers(0, 256, size=(12, 12, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    noisy = smooth + rng.normal(0, 6, size=smooth.shape)  # (H, W, 3), grey levels
    buffer = io.BytesIO()
    pixels = noisy.clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
