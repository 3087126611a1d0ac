"""A data set through a model, its scores, and how far it is from another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import DatasetError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.dataset import Dataset, Sample
from efficientface_deploy.workbench.evaluation import (
    BATCH,
    Differences,
    Scores,
    check_labels,
    labels_of,
    none_of,
    predict,
    run_in_batches,
    softmax,
)

PROBABILITIES = np.array(
    [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=np.float32
)
LABELS = np.array([0, 1, 1, 1])


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Grey pictures, each one step brighter, with labels that go round."""
    found = []
    for number in range(BATCH + 3):
        path = tmp_path / f"{number:03}.png"
        Image.new("RGB", (8, 8), (number, number, number)).save(path)
        found.append(Sample(path, number % 7))
    return found


def brightness(images: np.ndarray) -> np.ndarray:
    """(B, S, S, 3) -> (B, 7), a row of the image's mean."""
    return np.repeat(images.mean(axis=(1, 2, 3))[:, None], 7, axis=1).astype(np.float32)


@pytest.mark.parametrize("title", ["", "evaluating"])
def test_every_image_once_and_in_order(spec: ModelSpec, samples: list[Sample], title: str) -> None:
    sizes = []

    def infer(images: np.ndarray) -> np.ndarray:
        sizes.append(images.shape)
        return brightness(images)

    found = predict(infer, samples, spec, title)
    assert found[:, 0].tolist() == list(range(len(samples)))
    assert sizes == [(BATCH, 64, 64, 3), (3, 64, 64, 3)]
    assert labels_of(samples).tolist() == [number % 7 for number in range(len(samples))]


def test_no_images_give_no_rows(spec: ModelSpec) -> None:
    assert predict(brightness, [], spec).shape == (0, 7)


def test_images_in_memory() -> None:
    images = np.arange(BATCH + 1, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 2, 2, 3), np.uint8
    )
    assert run_in_batches(brightness, images)[:, 0].tolist() == list(range(BATCH + 1))


def test_softmax_of_large_logits() -> None:
    found = softmax(np.array([[1000.0, 1000.0], [0.0, -1000.0]], dtype=np.float32))
    assert found.tolist() == [[0.5, 0.5], [1.0, 0.0]]


def test_scores_by_hand() -> None:
    scores = Scores.of(LABELS, PROBABILITIES)
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert (scores.images, scores.accuracy) == (4, 0.75)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 2)
    # Every image is in a bin of its own: the mean of what its confidence lacks or has too much.
    assert scores.ece == pytest.approx((0.2 + 0.3 + 0.5 + 0.4) / 4)
    assert scores.per_class == {
        "precision": [0.5, 1.0, None],
        "recall": [1.0, pytest.approx(2 / 3), None],
        "f1": [pytest.approx(2 / 3), pytest.approx(0.8), None],
    }
    low, high = scores.accuracy_interval
    assert low < 0.75 < high
    assert scores.bootstrap.accuracy[0] <= 0.75 <= scores.bootstrap.accuracy[1]


def test_differences_by_hand() -> None:
    other = PROBABILITIES.copy()
    other[2] = [0.4, 0.5, 0.1]  # now right
    found = Differences.of(PROBABILITIES, other, LABELS)
    assert found.agreement == 0.75 and found.agreement_interval[1] < 1
    assert found.largest == pytest.approx(0.2)
    assert found.accuracy is not None and found.accuracy.value == 0.25
    assert found.mean_kl > 0
    assert Differences.of(PROBABILITIES, other).accuracy is None
    assert Differences.of(other, other).mean_kl == 0


def test_classes_without_images_are_named() -> None:
    assert none_of([3, 0, 1, 0], "abcd") == ", none of b, d"
    assert none_of([3, 1], "ab") == ""


def test_other_labels_are_refused(spec: ModelSpec, tmp_path: Path) -> None:
    dataset = Dataset(tmp_path, "mine", spec.labels, "rafdb", {})
    check_labels(spec, dataset)
    with pytest.raises(DatasetError, match=r"expected the model's labels: Neutral, .*found Anger"):
        check_labels(spec, Dataset(tmp_path, "mine", spec.labels[::-1], "rafdb", {}))
