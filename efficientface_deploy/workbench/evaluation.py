"""A data set through a model, and its scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array

BATCH = 32


Infer = Callable[[UInt8Array], Float32Array]


def run_in_batches(infer: Infer, images: UInt8Array) -> Float32Array:
    """Logits float32 (N, C) of images uint8 (N, S, S, 3), a batch at a time."""
    return np.concatenate([infer(images[at : at + BATCH]) for at in range(0, len(images), BATCH)])


def softmax(logits: Float32Array) -> Float32Array:
    """Probabilities (N, C) of logits (N, C)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Float32Array = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities
