"""A model file that tests itself where it runs: two pictures, and the logits that it must give.

The export computes the logits of the very graph that a file holds, in FP32 and without any
optimisation, and stores them in the file with the pictures. Whatever opens the file, on whatever
machine, has to give them again. The thresholds of the comparison with PyTorch are of no use here:
INT8 may move a probability by 0.75 there, and an engine that computes INT8 wrongly passes.

How a probe is written (for other languages too): JSON under ``efficientface.probe`` in an ONNX
file's metadata, under ``probe`` in an engine's sidecar::

    {"schema": 1, "side": B, "pixels": base64, "logits": [[...], ...], "tolerance": 0.08}

``pixels`` are the bytes of uint8 (K, B, B, 3), RGB. The model's input of side S repeats them: its
pixel (row, column) is the stored one at (row * B // S, column * B // S), so that no filter and no
decoder has a part in it. The difference is the root mean square of found minus stored logits, over
all pictures and classes, divided by that of the stored logits minus their mean over the classes.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array

SCHEMA_VERSION = 1
SIDE = 48  # of the stored pictures: 14 kB for two

TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.05, "int8": 0.08}
"""Largest difference of a right engine, by precision, as a part of the logits' spread.

Measured in November 2026 on an AMD EPYC with VNNI, on the CPU and GPU files of the bundled model
(112 pixels), the demo's (64), one of 160 and one of 96 pixels, and an LDG. Right are onnxruntime
1.18.1, 1.23.2, 1.29.0 and 1.32.0 with 1 and 2 threads, and OpenVINO 2026.4 with
``INFERENCE_PRECISION_HINT=f32``, where nothing else is said of them:

========= ============================== ===================================================
precision largest that right ones showed smallest that wrong ones showed
========= ============================== ===================================================
fp32      1.3e-6                         TF32 5e-5 on one picture of 16, 2e-4 on most; bfloat16
                                         5e-4; red and blue exchanged 0.07
bf16      0.013 (random weights 0.07)    as for FP16 (an FP32 file, OpenVINO told to round so)
fp16      0.016 (onnxruntime 1.29)       red and blue exchanged 0.12, other weights 0.5
int8      0.04                           truncation (onnxruntime 1.18 to 1.29) 0.12; exchanged
                                         channels 0.12; OpenVINO's own INT8 0.57 for the bundled
                                         model's GPU file
========= ============================== ===================================================

For INT8 a file's tolerance is smaller where few layers are rounded, so that truncation moves its
logits little (0.033 in the bundled model's GPU file, of truncation's 0.055), and larger where
rounding alone moves them further, as it does with random weights (0.25):
``export/verification/probes.py``.
"""

_MAX_PICTURES, _MAX_SIDE = 4, 256


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Pictures, and the logits of one graph for them.

    Attributes:
        pixels: uint8 (K, B, B, 3), RGB.
        logits: float32 (K, C).
        tolerance: Largest difference, see :meth:`difference`.
    """

    pixels: UInt8Array
    logits: Float32Array
    tolerance: float

    def images(self, side: int) -> UInt8Array:
        """The pictures as a model of this input size takes them: uint8 (K, side, side, 3)."""
        return enlarge(self.pixels, side)

    def difference(self, logits: Float32Array) -> float:
        """How far logits are from those that are right, as a part of these logits' spread.

        Args:
            logits: float32 (K, C), found for :meth:`images`.

        Returns:
            Zero or more; NaN where a logit is.
        """
        return float(differences(self.logits[None], logits[None])[0])

    def record(self) -> dict[str, Any]:
        """What a file holds of it: values for JSON."""
        return {
            "schema": SCHEMA_VERSION,
            "side": self.pixels.shape[1],
            "pixels": base64.b64encode(self.pixels.tobytes()).decode(),
            "logits": [[round(float(x), 7) for x in row] for row in self.logits],
            "tolerance": self.tolerance,
        }

    @classmethod
    def from_record(cls, record: object, path: object, classes: int) -> Probe | None:
        """Read a probe back.

        Args:
            record: What :meth:`record` gave, or None.
            path: The file, for the error.
            classes: How many logits the model gives.

        Returns:
            None where the file has none, or one of a later schema.

        Raises:
            ArtifactError: It is damaged.
        """
        if record is None or _schema(record) > SCHEMA_VERSION:
            return None
        try:
            assert isinstance(record, Mapping)
            side, tolerance = record["side"], float(record["tolerance"])
            logits = np.array(record["logits"], dtype=np.float32)
            raw = np.frombuffer(base64.b64decode(record["pixels"], validate=True), np.uint8)
            pixels = raw.reshape(len(logits), side, side, 3)
            valid = (
                1 <= len(logits) <= _MAX_PICTURES
                and 1 <= side <= _MAX_SIDE
                and logits.shape == (len(logits), classes)
                and bool(np.isfinite(logits).all())
                and 0 < tolerance < math.inf
            )
        except (AssertionError, KeyError, TypeError, ValueError, OverflowError, binascii.Error):
            valid = False
        if not valid:
            expected, fix = "a probe of pictures and logits", "export the model again"
            raise ArtifactError(path, expected, "a damaged one", fix)
        return cls(pixels, logits, tolerance)

    @classmethod
    def from_text(cls, text: str | None, path: object, classes: int) -> Probe | None:
        """Read a probe from the JSON in an ONNX file's metadata; see :meth:`from_record`."""
        try:
            record = None if text is None else json.loads(text)
        except (ValueError, RecursionError):
            record = "damaged"
        return cls.from_record(record, path, classes)


def _schema(record: object) -> int:
    schema = record.get("schema") if isinstance(record, Mapping) else 0
    return schema if type(schema) is int else 0


@dataclasses.dataclass(frozen=True)
class Check:
    """What a probe showed when a model was loaded.

    Attributes:
        engine: What ran it: ``onnx:cpu, onnxruntime 1.32.0``.
        difference: From the logits that are right, as a part of their spread.
        tolerance: The largest that is allowed.
    """

    engine: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the engine computes what the file says."""
        return self.difference <= self.tolerance  # not so for NaN

    def __str__(self) -> str:
        """For people: what was checked, and how near it came."""
        off = f"{self.difference:.1g} off, at most {self.tolerance:g}"
        return f"checked: right on {self.engine} ({off})"


def enlarge(pixels: UInt8Array, side: int) -> UInt8Array:
    """Repeat the pixels of pictures: uint8 (K, B, B, 3) to (K, side, side, 3)."""
    at = np.arange(side) * pixels.shape[1] // side
    return np.ascontiguousarray(pixels[:, at][:, :, at])


def differences(expected: Float32Array, found: Float32Array) -> np.ndarray[Any, Any]:
    """Differences in logits as a part of the spread of those expected.

    Args:
        expected: float32 (N, K, C): N times K pictures.
        found: The same of what is judged.

    Returns:
        float64 (N,).
    """
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    spread = np.square(expected - expected.mean(axis=2, keepdims=True)).mean(axis=(1, 2))
    error = np.square(found - expected).mean(axis=(1, 2))
    return np.asarray(np.sqrt(error / np.maximum(spread, 1e-12)))
