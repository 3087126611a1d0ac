from __future__ import annotations

import numpy as np
import pytest

from training.trainer.sureness import fit_threshold, keeps_promise


@pytest.mark.parametrize(("wrong", "count"), [(0, 59), (1, 93), (2, 124), (3, 153), (4, 181)])
def test_sample_sizes_are_those_of_the_textbooks(wrong, count):
    """To show 95 % with 95 % confidence, as acceptance sampling has them."""
    assert keeps_promise(count, wrong, 0.95)
    assert not keeps_promise(count - 1, wrong, 0.95)


def test_large_samples():
    assert keeps_promise(100_000, 4_800, 0.95) and not keeps_promise(100_000, 5_000, 0.95)
    assert not keeps_promise(0, 0, 0.95) and not keeps_promise(10, 10, 0.95)


def draw(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (count, 2) and labels: a label is right as often as its confidence says."""
    confidence = generator.uniform(0.5, 1, count)
    predicted = generator.integers(0, 2, count)
    probabilities = np.empty((count, 2), np.float32)
    probabilities[np.arange(count), predicted] = confidence
    probabilities[np.arange(count), 1 - predicted] = 1 - confidence
    wrong = generator.uniform(size=count) > confidence
    return probabilities, np.where(wrong, 1 - predicted, predicted)


def test_the_promise_is_kept_and_not_by_never_being_sure():
    generator = np.random.default_rng(0)
    found = np.array([fit_threshold(*draw(2500, generator), precision=0.9) for _ in range(200)])
    precision = (found + 1) / 2  # of all labels above a threshold
    assert np.mean(precision < 0.9) < 0.05
    assert 0.8 < np.median(found) < 0.86  # 0.8 is what an endless sample would give


def test_it_ends_at_the_first_failure():
    """Though all labels together would keep the promise, those above 0.8 do not."""
    confidence = np.repeat([0.95, 0.85, 0.6], [300, 50, 1000]).astype(np.float32)
    labels = np.zeros(len(confidence), dtype=int)
    labels[300:330] = 1
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    assert keeps_promise(1350, 30, 0.95) and fit_threshold(probabilities, labels) == 0.85


@pytest.mark.parametrize("count", [0, 1, 58, 59])
def test_too_few_images_show_nothing(count):
    probabilities = np.tile(np.array([[0.999, 0.001]], np.float32), (count, 1))
    found = fit_threshold(probabilities, np.zeros(count, dtype=int))
    assert found == (0.01 if count == 59 else 1)


def test_an_early_error_does_not_end_it():
    confidence = np.linspace(0.9999, 0.6, 400, dtype=np.float32)
    labels = (np.arange(400) == 1).astype(int)
    found = fit_threshold(np.stack([confidence, 1 - confidence], axis=1), labels)
    assert found < 0.61


def test_certain_labels_are_sure():
    """A softmax in float32 may say exactly 1."""
    probabilities = np.tile(np.array([[1, 0]], np.float32), (100, 1))
    assert fit_threshold(probabilities, np.zeros(100, dtype=int)) < 1
