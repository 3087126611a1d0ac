from __future__ import annotations

import numpy as np
import pytest

from efficientface_deploy.workbench.metrics import (
    accuracy,
    bootstrap_intervals,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    max_probability_difference,
    mean_kl,
    paired_accuracy_difference,
    per_class_f1,
    per_class_precision,
    per_class_recall,
    reliability_bins,
    share_interval,
    top1_agreement,
)

CLASSES = 5


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def random_case(seed: int, present: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 (N, C), better than chance, and labels (N,) below ``present``."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present, size=200)
    logits = rng.normal(size=(200, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    logits[:, present:] = -50.0  # never predicted either
    return softmax(logits).astype(np.float32), labels


def test_accuracy_by_hand() -> None:
    assert accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75


def test_confusion_matrix_has_labels_as_rows() -> None:
    counts = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_per_class_recall_is_nan_for_an_unlabelled_class() -> None:
    recall = per_class_recall(confusion_matrix(np.array([0, 0, 2]), np.array([0, 1, 2]), 4))
    np.testing.assert_array_equal(recall, [0.5, np.nan, 1.0, np.nan])


def test_macro_f1_leaves_out_a_class_that_never_occurs() -> None:
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0])
    expected = (2 * 2 / (2 * 2 + 1) + 2 * 1 / (2 * 1 + 1)) / 2
    assert macro_f1(confusion_matrix(labels, predictions, 2)) == pytest.approx(expected)
    assert macro_f1(confusion_matrix(labels, predictions, 9)) == pytest.approx(expected)


def test_macro_f1_counts_a_class_that_is_only_predicted_as_zero() -> None:
    assert macro_f1(confusion_matrix(np.array([0, 0]), np.array([0, 1]), 2)) == pytest.approx(
        (2 / 3 + 0) / 2
    )


def test_calibration_error_by_hand() -> None:
    # Two images of confidence 0.9, one of them right; two of 0.6, both right.
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.6, 0.4]])
    labels = np.array([0, 0, 0, 0])
    expected = (2 * abs(0.5 - 0.9) + 2 * abs(1.0 - 0.6)) / 4
    assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(expected)


def test_calibration_error_bins_are_closed_above() -> None:
    # 0.5 belongs to (0, 0.5]: alone there, its error does not cancel against 0.75's.
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75]])
    error = expected_calibration_error(probabilities, np.array([0, 0]), bins=2)
    assert error == pytest.approx((0.5 + 0.75) / 2)


def test_certain_and_right_is_calibrated() -> None:
    assert expected_calibration_error(np.eye(3), np.arange(3)) == 0.0


@pytest.mark.parametrize("present", [CLASSES, 3])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_torchmetrics(seed: int, present: int) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probabilities, labels = random_case(seed, present)
    predictions = probabilities.argmax(axis=1)
    p, t = torch.from_numpy(probabilities), torch.from_numpy(labels)

    expected = functional.multiclass_accuracy(p, t, CLASSES, average="micro").item()
    assert accuracy(labels, predictions) == pytest.approx(expected)
    expected = functional.multiclass_f1_score(p, t, CLASSES, average="macro").item()
    assert macro_f1(confusion_matrix(labels, predictions, CLASSES)) == pytest.approx(expected)
    matrix = functional.multiclass_confusion_matrix(p, t, CLASSES).numpy()
    np.testing.assert_array_equal(confusion_matrix(labels, predictions, CLASSES), matrix)
    recall = functional.multiclass_recall(p, t, CLASSES, average="none").numpy()[:present]
    ours = per_class_recall(confusion_matrix(labels, predictions, CLASSES))
    np.testing.assert_allclose(ours[:present], recall, rtol=1e-6)
    assert np.isnan(ours[present:]).all()
    for bins in (10, 15):
        expected = functional.multiclass_calibration_error(p, t, CLASSES, bins, norm="l1").item()
        ece = expected_calibration_error(probabilities, labels, bins)
        assert ece == pytest.approx(expected, abs=1e-5)


def test_mean_kl_by_hand() -> None:
    p, q = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.25, 0.75], [1.0, 0.0]])
    expected = (0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert mean_kl(p, q) == pytest.approx(expected)


def test_mean_kl_is_directed_finite_and_never_negative() -> None:
    certain, even = np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])
    assert mean_kl(certain, even) == pytest.approx(np.log(2))
    assert np.log(2) < mean_kl(even, certain) < np.inf
    probabilities, _ = random_case(0)
    assert mean_kl(probabilities, probabilities) == 0.0
    nudged = probabilities * np.float32(1 - 1e-6)  # rows no longer sum to one
    assert 0.0 <= mean_kl(probabilities, nudged) < 1e-12


def test_agreement_and_largest_difference() -> None:
    p = np.array([[0.6, 0.4], [0.3, 0.7]], dtype=np.float32)
    q = np.array([[0.4, 0.6], [0.2, 0.8]], dtype=np.float32)
    assert top1_agreement(p, q) == 0.5
    assert max_probability_difference(p, q) == pytest.approx(0.2)


def test_nan_is_not_hidden() -> None:
    good, bad = np.array([[0.5, 0.5]]), np.array([[np.nan, 0.5]])
    assert np.isnan(mean_kl(good, bad))
    assert np.isnan(max_probability_difference(good, bad))
    assert np.isnan(expected_calibration_error(bad, np.array([0])))


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [([], []), ([0, 1], [0]), ([[0], [1]], [[0], [1]]), ([0, 3], [0, 0]), ([0, -1], [0, 0])],
)
def test_wrong_indices_are_refused(labels: list[int], predictions: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        confusion_matrix(np.array(labels, dtype=int), np.array(predictions, dtype=int), 3)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        mean_kl(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="N, C"):
        expected_calibration_error(np.ones(3), np.array([0, 1, 2]))


# ---- Every class, intervals, reliability ---------------------------------------------------------


def test_precision_recall_and_f1_of_each_class_by_hand() -> None:
    labels, predictions = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 1])
    nan = np.nan
    confusion = confusion_matrix(labels, predictions, 4)
    np.testing.assert_allclose(per_class_precision(confusion), [1, 1 / 3, nan, nan])
    np.testing.assert_allclose(per_class_recall(confusion), [2 / 3, 1, 0, nan])
    f1 = per_class_f1(confusion)
    np.testing.assert_allclose(f1, [0.8, 0.5, 0, nan])
    assert macro_f1(confusion) == pytest.approx(np.nanmean(f1))


@pytest.mark.parametrize("seed", range(2))
def test_intervals_are_those_of_drawing_images(seed: int) -> None:
    """Against the textbook's way: draw images with replacement and score each sample anew."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(4, 300, p=(0.6, 0.25, 0.12, 0.03))
    predictions = np.where(generator.random(300) < 0.7, labels, generator.integers(0, 4, 300))
    drawn = generator.integers(0, 300, (4000, 300))
    scores = [
        (
            accuracy(labels[i], predictions[i]),
            macro_f1(confusion_matrix(labels[i], predictions[i], 4)),
        )
        for i in drawn
    ]
    low, high = np.quantile(scores, (0.025, 0.975), axis=0)
    found = bootstrap_intervals(
        confusion_matrix(labels, predictions, 4), resamples=20_000, seed=seed
    )
    np.testing.assert_allclose(found.accuracy, (low[0], high[0]), atol=0.005)
    np.testing.assert_allclose(found.macro_f1, (low[1], high[1]), atol=0.012)
    assert found.accuracy[0] < accuracy(labels, predictions) < found.accuracy[1]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        labels = np.zeros(400, dtype=int)
        predictions = (generator.random(400) > 0.8).astype(int)  # right four times in five
        low, high = bootstrap_intervals(
            confusion_matrix(labels, predictions, 2), resamples=500
        ).accuracy
        hits += low <= 0.8 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_intervals_are_seeded_wider_at_a_higher_level_and_a_point_without_errors() -> None:
    probabilities, labels = random_case(0)
    predictions = probabilities.argmax(axis=1)
    first = bootstrap_intervals(confusion_matrix(labels, predictions, CLASSES))
    assert first == bootstrap_intervals(confusion_matrix(labels, predictions, CLASSES))
    assert first != bootstrap_intervals(confusion_matrix(labels, predictions, CLASSES), seed=1)
    wider = bootstrap_intervals(confusion_matrix(labels, predictions, CLASSES), level=0.99)
    assert wider.accuracy[0] < first.accuracy[0] and wider.accuracy[1] > first.accuracy[1]
    perfect = bootstrap_intervals(confusion_matrix(labels, labels, CLASSES))
    assert perfect.accuracy == perfect.macro_f1 == (1.0, 1.0)
    wrong = confusion_matrix(np.array([1]), np.array([0]), 2)
    assert bootstrap_intervals(wrong).accuracy == (0.0, 0.0)


def test_reliability_bins_by_hand() -> None:
    probabilities = np.array([[0.5, 0.5], [0.4, 0.6], [0.2, 0.8], [0.0, 1.0]])
    found = reliability_bins(probabilities, np.array([0, 1, 0, 1]), bins=4)
    nan = np.nan
    np.testing.assert_array_equal(found.count, [0, 1, 1, 2])  # 0.5 belongs to (0.25, 0.5]
    np.testing.assert_allclose(found.confidence, [nan, 0.5, 0.6, 0.9])
    np.testing.assert_allclose(found.accuracy, [nan, 1, 1, 0.5])
    assert found.count.dtype == np.int64
    expected = (0.5 + 0.4 + 2 * 0.4) / 4
    ece = expected_calibration_error(probabilities, np.array([0, 1, 0, 1]), bins=4)
    assert ece == pytest.approx(expected)


@pytest.mark.parametrize(
    ("count", "images", "expected"),
    [
        # R: binom::binom.confint(method = "wilson")
        (5, 10, (0.236593, 0.763407)),
        (0, 10, (0.0, 0.277533)),
        (10, 10, (0.722467, 1.0)),
        (3172, 3191, (0.990715, 0.996185)),
    ],
)
def test_share_interval(count: int, images: int, expected: tuple[float, float]) -> None:
    assert share_interval(count, images) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("count", "images"), [(-1, 10), (11, 10), (0, 0)])
def test_share_interval_of_nonsense(count: int, images: int) -> None:
    with pytest.raises(ValueError, match=f"found {count} of {images}"):
        share_interval(count, images)


def paired_case(gained: int, lost: int, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and two predictions; the second is right where the first is not, or the other way."""
    labels = np.zeros(images, dtype=int)
    reference, predictions = labels.copy(), labels.copy()
    reference[:gained] = 1
    predictions[gained : gained + lost] = 1
    both_wrong = slice(gained + lost, gained + lost + 5)
    reference[both_wrong] = predictions[both_wrong] = 2
    return labels, reference, predictions


def test_paired_accuracy_difference_by_hand() -> None:
    """(2 - 4) / 102 plus or minus 1.95996 sqrt((6 / 102 - (2 / 102)^2) / 102)."""
    labels, reference, predictions = paired_case(gained=1, lost=3, images=100)
    found = paired_accuracy_difference(labels, reference, predictions)
    assert found.value == pytest.approx(-0.02)
    assert found.interval == pytest.approx((-0.066523, 0.027307), abs=2e-6)
    swapped = paired_accuracy_difference(labels, predictions, reference)
    assert swapped.value == -found.value
    assert swapped.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_two_that_never_differ_are_not_proven_equal() -> None:
    found = paired_accuracy_difference(*paired_case(0, 0, 100))
    assert found.value == 0
    assert found.interval[0] < 0 < found.interval[1] < 0.05


@pytest.mark.parametrize(("up", "down"), [(0.01, 0.01), (0.03, 0.005), (0.002, 0.002)])
def test_closed_forms_cover_the_truth_too(up: float, down: float) -> None:
    rng = np.random.default_rng(0)
    hits = shares = 0
    for gained, lost, _ in rng.multinomial(500, (up, down, 1 - up - down), size=400):
        low, high = paired_accuracy_difference(*paired_case(gained, lost, 500)).interval
        hits += low <= up - down <= high
        low, high = share_interval(int(gained + lost), 500)
        shares += low <= up + down <= high
    assert hits / 400 > 0.93
    assert shares / 400 > 0.92
