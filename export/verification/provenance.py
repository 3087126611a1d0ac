"""How an artifact was made: written into it, and read back with care, since files get edited."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientface_deploy.errors import ArtifactError

PRECISIONS = ("fp32", "fp16", "int8")


class Provenance:
    """What an artifact says of its making; empty for a checkpoint.

    Args:
        record: The JSON object in the artifact.
        path: The artifact, for errors.

    Attributes:
        record: The same.
        precision: ``fp32``, ``fp16`` or ``int8``.
        target: ``cpu`` or ``gpu``; empty when it does not say, as in all that follow.
        graph: ``plain``, ``deploy`` or ``wide``.
        input: Type and layout of the input.
        arithmetic: How many layers run in which precision, as text.
        created: When it was made.
        versions: Of what made it.
        trained_size: Side of the input that the network was trained at, pixels, where it is not the
            artifact's own; else None.
        excluded: Number of layers that were left out of INT8 on purpose.
        largest_fp32_value: Largest magnitude of any tensor before FP16; None where FP16 has no
            part in it.
        weights: File name and SHA-256 of the checkpoint that it descends from; None if unknown.

    Raises:
        ArtifactError: The precision is not one that we make, and so has no threshold.
    """

    def __init__(self, record: Mapping[str, Any], path: Path) -> None:
        def text(key: str, default: str = "") -> str:
            return str(record.get(key, default))

        self.record = record
        self.precision = text("precision", "fp32")
        self.target, self.graph, self.input = text("target"), text("graph"), text("input")
        self.arithmetic, self.created = text("arithmetic"), text("created")
        versions, excluded = record.get("versions"), record.get("excluded")
        largest, weights = record.get("largest_fp32_value"), record.get("weights")
        self.versions: dict[str, str] = {}
        if isinstance(versions, dict):
            self.versions = {str(key): str(value) for key, value in versions.items()}
        size = record.get("trained_size")
        self.trained_size = size if type(size) is int else None
        self.excluded = len(excluded) if isinstance(excluded, list) else 0
        magnitude = largest.get("magnitude") if isinstance(largest, dict) else None
        self.largest_fp32_value = float(magnitude) if isinstance(magnitude, (int, float)) else None
        self.weights: dict[str, str] | None = None
        if isinstance(weights, dict) and isinstance(weights.get("sha256"), str):
            self.weights = {"file": str(weights.get("file", "")), "sha256": weights["sha256"]}
        if self.precision not in PRECISIONS:
            fix = "export it again with efficientface-export"
            wanted = "precision " + ", ".join(PRECISIONS)
            raise ArtifactError(path, wanted, self.precision, fix)
