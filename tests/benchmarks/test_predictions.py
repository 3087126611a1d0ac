"""Predictions kept beside a result, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.predictions import (
    NAME,
    keep,
    paired_difference,
    read_beside,
    read_predictions,
    write_predictions,
)
from efficientface_deploy.errors import ArtifactError

IMAGES = ["a/1.png", "a/2.png", "b/ü.png"]
LABELS = np.array([0, 1, 1])
# The first two differ by less than float16 can tell.
PROBABILITIES = np.array([[0.50001, 0.49999], [0.2, 0.8], [0.9, 0.1]], dtype=np.float32)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / NAME
    write_predictions(path, keep("hash", IMAGES, LABELS, {"a.onnx on onnx:cpu": PROBABILITIES}))
    found = read_predictions(path)
    assert (found.images_sha256, found.images) == ("hash", IMAGES)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.classes["a.onnx on onnx:cpu"].tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.probabilities["a.onnx on onnx:cpu"], PROBABILITIES, atol=1e-3)
    assert [child.name for child in tmp_path.iterdir()] == [NAME]


def test_the_class_survives_rounding() -> None:
    close = np.array([[0.49999, 0.50001]], dtype=np.float32)
    kept = keep("hash", ["x"], np.array([1]), {"a": close})
    assert kept.probabilities["a"].argmax(axis=1).tolist() == [0]
    assert kept.classes["a"].tolist() == [1]


def test_difference_counts_what_changed() -> None:
    old = keep("hash", IMAGES, LABELS, {"a": PROBABILITIES})
    new = keep("hash", IMAGES, LABELS, {"a": PROBABILITIES[[0, 1, 1]], "b": PROBABILITIES})
    found = paired_difference(old, new, "a")
    assert found is not None and found.value == pytest.approx(1 / 3) and found.changed == 1
    assert paired_difference(old, new, "b") is None
    assert paired_difference(old, keep("other", IMAGES, LABELS, {"a": PROBABILITIES}), "a") is None


def test_predictions_of_other_images_are_not_taken(tmp_path: Path) -> None:
    result = tmp_path / "accuracy.json"
    assert read_beside(result, {"data": {"images_sha256": "hash"}}) is None
    write_predictions(tmp_path / NAME, keep("hash", IMAGES, LABELS, {"a": PROBABILITIES}))
    assert read_beside(result, {"data": {"images_sha256": "hash"}}) is not None
    assert read_beside(result, {"data": {"images_sha256": "another"}}) is None


@pytest.mark.parametrize("damage", ["nonsense", "truncated", "pickled", "short", "empty"])
def test_a_damaged_file_is_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    write_predictions(path, keep("hash", IMAGES, LABELS, {"a": PROBABILITIES}))
    if damage == "nonsense":
        path.write_bytes(b"not an archive")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "pickled":
        np.savez(path, images_sha256=np.array([{"x": 1}], dtype=object))
    elif damage == "short":
        write_predictions(path, keep("hash", IMAGES[:2], LABELS, {"a": PROBABILITIES}))
    else:
        path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"expected predictions of benchmarks/accuracy\.py"):
        read_predictions(path)
