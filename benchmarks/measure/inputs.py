"""What is timed: batches, pictures, and a call for each kind of work."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnxruntime
from PIL import Image

from benchmarks.measure.models import Contender
from efficientface_deploy.artifact import OUTPUTS, UINT8_INPUT
from efficientface_deploy.vision.preprocess import UInt8Array
from efficientface_deploy.workbench.environment import (
    l2_bytes,
    last_level_cache_bytes,
)
from efficientface_deploy.workbench.timing import Call

_LARGEST_INPUTS = 64 << 20  # bytes; some servers' caches are as large as a phone's memory


_PHOTOS = 16


_PHOTO_SIDE = 224  # pixels, about what a face measures in a picture of 1 megapixel


_JPEG_QUALITY = 90


def compute_call(contender: Contender, batches: Sequence[UInt8Array]) -> Call:
    """A call that runs the next of several batches, each uint8 (N, S, S, 3)."""
    inputs = itertools.cycle(batches)
    infer = contender.predictor.infer

    def call() -> None:
        infer(next(inputs))

    return call


def end_to_end_call(contender: Contender, jpegs: Sequence[bytes]) -> Call:
    """A call that labels the next of several JPEG files in memory."""
    inputs = itertools.cycle(jpegs)
    predictor = contender.predictor

    def call() -> None:
        predictor(next(inputs))

    return call


def make_batches(side: int, batch: int, seed: int) -> list[UInt8Array]:
    """Different inputs, together twice as large as the last-level cache, or 64 MiB.

    A single input, used again and again, would be found in the cache as no camera's frame is.

    Args:
        side: Side S of the model's input, pixels.
        batch: Images N in each.
        seed: Of the noise; what the pixels show does not change a network's arithmetic.

    Returns:
        At least four arrays, uint8 (N, S, S, 3).
    """
    count = max(4, math.ceil(input_bytes() / (batch * side * side * 3)))
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, size=(count, batch, side, side, 3), dtype=np.uint8))


def input_bytes() -> int:
    """How much one set of inputs holds at least."""
    return max(2 * l2_bytes(), min(2 * last_level_cache_bytes(), _LARGEST_INPUTS))


def make_jpegs(seed: int) -> list[bytes]:
    """JPEG files in memory, smooth with a little noise: about a photograph's work to decode."""
    rng = np.random.default_rng(seed)
    return [_make_jpeg(rng) for _ in range(_PHOTOS)]


def _make_jpeg(rng: np.random.Generator) -> bytes:
    coarse = rng.integers(0, 256, size=(12, 12, 3), dtype=np.uint8)
    side = (_PHOTO_SIDE, _PHOTO_SIDE)
    smooth = np.asarray(Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC))
    noisy = smooth + rng.normal(0, 6, size=smooth.shape)  # (S, S, 3), grey levels
    buffer = io.BytesIO()
    pixels = noisy.clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def call_of(session: onnxruntime.InferenceSession, pictures: UInt8Array) -> Call:
    """Infers one picture, another one each time."""
    feeds = itertools.cycle([{UINT8_INPUT: picture} for picture in pictures])

    def call() -> None:
        session.run(OUTPUTS, next(feeds))

    return call
