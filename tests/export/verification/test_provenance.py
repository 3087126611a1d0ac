"""How an artifact was made, read back with care: files get edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efficientface_deploy.errors import ArtifactError
from efficientface_export.verification.provenance import PRECISIONS, Provenance


def of(record: dict[str, Any]) -> Provenance:
    return Provenance(record, Path("model.onnx"))


def test_a_checkpoint_says_nothing() -> None:
    empty = of({})
    assert (empty.precision, empty.target, empty.graph, empty.input) == ("fp32", "", "", "")
    assert (empty.arithmetic, empty.created, empty.versions, empty.excluded) == ("", "", {}, 0)
    assert (empty.weights, empty.largest_fp32_value) == (None, None)


def test_what_is_said() -> None:
    record = {
        "precision": "int8",
        "target": "gpu",
        "graph": "deploy",
        "excluded": ["a", "b"],
        "weights": {"file": "student.safetensors", "sha256": "f" * 64},
        "versions": {"onnx": "1.23"},
        "largest_fp32_value": {"tensor": "x", "magnitude": 255},
    }
    found = of(record)
    assert (found.precision, found.target, found.graph) == ("int8", "gpu", "deploy")
    assert found.excluded == 2
    assert found.weights == record["weights"] and found.versions == record["versions"]
    assert found.largest_fp32_value == 255.0


@pytest.mark.parametrize("odd", [None, 3, "a", [], {"sha256": 3}])
def test_what_is_damaged_is_unknown(odd: Any) -> None:
    found = of({"weights": odd, "versions": [odd], "largest_fp32_value": {"magnitude": "x"}})
    assert (found.weights, found.versions, found.largest_fp32_value) == (None, {}, None)
    assert of({"excluded": odd}).excluded == 0


def test_unknown_precision() -> None:
    with pytest.raises(ArtifactError, match="expected precision fp32, fp16, int8, found bf16"):
        of({"precision": "bf16"})
    assert [of({"precision": name}).precision for name in PRECISIONS] == list(PRECISIONS)
