"""How good a classifier is, and how near two classifiers are: numpy alone, pure functions.

N is the number of images, C the number of classes. Labels and predictions are class indices;
probabilities are rows that sum to one. Sums are taken in float64, whatever comes in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]

KL_EPSILON = 1e-12
"""Smallest probability inside a logarithm; a float32 softmax underflows to zero."""


def accuracy(labels: IndexArray, predictions: IndexArray) -> float:
    """Share of images whose predicted class is the labelled one.

    Args:
        labels: Integers (N,).
        predictions: Integers (N,).

    Returns:
        0 to 1.
    """
    _check_indices(labels, predictions)
    return float(np.mean(labels == predictions))


def confusion_matrix(
    labels: IndexArray, predictions: IndexArray, num_classes: int
) -> npt.NDArray[np.int64]:
    """Count the images of each labelled class by predicted class.

    Args:
        labels: Integers (N,), 0 to C - 1.
        predictions: Integers (N,), 0 to C - 1.
        num_classes: C.

    Returns:
        int64 (C, C); row = label, column = prediction.
    """
    _check_indices(labels, predictions, num_classes)
    cells = labels.astype(np.int64) * num_classes + predictions.astype(np.int64)
    counts = np.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def per_class_recall(
    labels: IndexArray, predictions: IndexArray, num_classes: int
) -> npt.NDArray[np.float64]:
    """Share of each labelled class that was found.

    Args:
        labels: Integers (N,), 0 to C - 1.
        predictions: Integers (N,), 0 to C - 1.
        num_classes: C.

    Returns:
        float64 (C,), 0 to 1; NaN for a class that no image is labelled with.
    """
    counts = confusion_matrix(labels, predictions, num_classes)
    return _ratio(np.diagonal(counts), counts.sum(axis=1))


def macro_f1(labels: IndexArray, predictions: IndexArray, num_classes: int) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), every class weighing the same.

    A class that is neither labelled nor predicted anywhere is left out of the mean, as torchmetrics
    and scikit-learn do; one that is labelled but never predicted, or the other way, counts as 0.

    Args:
        labels: Integers (N,), 0 to C - 1.
        predictions: Integers (N,), 0 to C - 1.
        num_classes: C.

    Returns:
        0 to 1.
    """
    counts = confusion_matrix(labels, predictions, num_classes)
    # Row sum = TP + FN, column sum = TP + FP.
    f1 = _ratio(2 * np.diagonal(counts), counts.sum(axis=1) + counts.sum(axis=0))
    return float(np.nanmean(f1))


def expected_calibration_error(
    probabilities: FloatArray, labels: IndexArray, bins: int = 15
) -> float:
    """How far a network's confidence is from its accuracy (ECE; Guo et al. 2017, equation 3).

    The images are sorted into bins of equal width by the probability of the predicted class,
    ((b - 1) / bins, b / bins]; ECE is the mean over images of |accuracy - mean confidence| of
    their bin.

    Args:
        probabilities: Floats (N, C).
        labels: Integers (N,), 0 to C - 1.
        bins: Number of bins; 15 as in the paper.

    Returns:
        0 (calibrated) to 1.
    """
    _check_probabilities(probabilities)
    predictions = probabilities.argmax(axis=1)
    _check_indices(labels, predictions, probabilities.shape[1])
    confidence = probabilities.max(axis=1).astype(np.float64)
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    # In a bin of n images, n * |accuracy - confidence| is the size of the summed difference.
    gap = np.bincount(
        np.searchsorted(inner_edges, confidence, side="left"),
        weights=(predictions == labels) - confidence,
    )
    return float(np.abs(gap).sum() / len(labels))


def mean_kl(reference: FloatArray, other: FloatArray) -> float:
    """Mean over images of KL(reference || other) = sum_c p_c log(p_c / q_c).

    Both are clipped from below at :data:`KL_EPSILON` and divided by their sums again, so that the
    divergence is finite and rounding cannot make it negative.

    Args:
        reference: Probabilities p, floats (N, C).
        other: Probabilities q, floats (N, C).

    Returns:
        Nats, 0 or more.
    """
    _check_same_shape(reference, other)
    p, q = _clipped(reference), _clipped(other)
    divergence = (p * (np.log(p) - np.log(q))).sum(axis=1)  # (N,)
    return float(np.maximum(divergence.mean(), 0.0))  # unlike max(), lets NaN through


def top1_agreement(reference: FloatArray, other: FloatArray) -> float:
    """Share of images to which both give the same most probable class.

    Args:
        reference: Probabilities or logits, floats (N, C).
        other: The same of the other network, floats (N, C).

    Returns:
        0 to 1.
    """
    _check_same_shape(reference, other)
    return float(np.mean(reference.argmax(axis=1) == other.argmax(axis=1)))


def max_probability_difference(reference: FloatArray, other: FloatArray) -> float:
    """Largest difference in any probability of any image.

    Args:
        reference: Probabilities, floats (N, C).
        other: Probabilities, floats (N, C).

    Returns:
        0 to 1.
    """
    _check_same_shape(reference, other)
    return float(np.abs(reference.astype(np.float64) - other.astype(np.float64)).max())


def _clipped(probabilities: FloatArray) -> npt.NDArray[np.float64]:
    clipped = np.maximum(probabilities.astype(np.float64), KL_EPSILON)
    return np.asarray(clipped / clipped.sum(axis=1, keepdims=True))


def _ratio(
    numerator: npt.NDArray[np.int64], denominator: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Quotient, NaN where there is nothing to divide by."""
    result = np.full(len(denominator), np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result


# A mismatch would otherwise broadcast, or count in a neighbour's cell, and give a wrong number.


def _check_indices(
    labels: IndexArray, predictions: IndexArray, num_classes: int | None = None
) -> None:
    if labels.ndim != 1 or labels.shape != predictions.shape or len(labels) == 0:
        raise ValueError(
            f"expected labels and predictions of one shape (N,), N > 0, "
            f"found {labels.shape} and {predictions.shape}"
        )
    if num_classes is None:
        return
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= num_classes:
            raise ValueError(
                f"expected {name} from 0 to {num_classes - 1}, "
                f"found {values.min()} to {values.max()}"
            )


def _check_probabilities(probabilities: FloatArray) -> None:
    if probabilities.ndim != 2 or 0 in probabilities.shape:
        raise ValueError(f"expected probabilities (N, C), N > 0, found {probabilities.shape}")


def _check_same_shape(reference: FloatArray, other: FloatArray) -> None:
    _check_probabilities(reference)
    if reference.shape != other.shape:
        raise ValueError(f"expected one shape (N, C), found {reference.shape} and {other.shape}")
