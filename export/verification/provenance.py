"""How an artifact was made: written into it, and read back with care, since files get edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientface_deploy.errors import ArtifactError

PRECISIONS = ("fp32", "fp16", "int8")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What an artifact says of its making; empty for a checkpoint.

    Attributes:
        record: The JSON object in the artifact.
        path: The artifact, for errors.

    Raises:
        ArtifactError: The precision is not one that we make.
    """

    record: Mapping[str, Any]
    path: Path

    def __post_init__(self) -> None:
        """Refuse a precision for which there is no threshold."""
        if self.precision not in PRECISIONS:
            fix = "export it again with efficientface-export"
            wanted = "precision " + ", ".join(PRECISIONS)
            raise ArtifactError(self.path, wanted, self.precision, fix)

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``int8``."""
        return str(self.record.get("precision", "fp32"))

    @property
    def target(self) -> str:
        """``cpu`` or ``gpu``; empty when it does not say."""
        return str(self.record.get("target", ""))

    @property
    def graph(self) -> str:
        """``plain`` or ``deploy``; empty for a checkpoint, which has none yet."""
        return str(self.record.get("graph", ""))

    @property
    def input(self) -> str:
        """Type and layout of the input; empty for a checkpoint, which has none yet."""
        return str(self.record.get("input", ""))

    @property
    def arithmetic(self) -> str:
        """How many layers run in which precision, as text."""
        return str(self.record.get("arithmetic", ""))

    @property
    def created(self) -> str:
        """When it was made; empty when it does not say."""
        return str(self.record.get("created", ""))

    @property
    def versions(self) -> dict[str, str]:
        """Versions of what made it; empty when it does not say."""
        found = self.record.get("versions")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    @property
    def largest_fp32_value(self) -> float | None:
        """Largest magnitude of any tensor before FP16; None where FP16 has no part in it."""
        found = self.record.get("largest_fp32_value")
        value = found.get("magnitude") if isinstance(found, dict) else None
        return float(value) if isinstance(value, (int, float)) else None

    @property
    def excluded(self) -> int:
        """Number of layers that were left out of INT8 on purpose."""
        excluded = self.record.get("excluded", [])
        return len(excluded) if isinstance(excluded, list) else 0

    @property
    def weights(self) -> dict[str, str] | None:
        """File name and SHA-256 of the checkpoint that it descends from; None if unknown."""
        weights = self.record.get("weights")
        if not isinstance(weights, dict) or not isinstance(weights.get("sha256"), str):
            return None
        return {"file": str(weights.get("file", "")), "sha256": weights["sha256"]}
