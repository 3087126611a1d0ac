"""How good a classifier is, and how near two classifiers are: numpy alone, pure functions.

N is the number of images, C the number of classes. Labels and predictions are class indices;
probabilities are rows that sum to one. Sums are taken in float64, whatever comes in.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]
CountArray = npt.NDArray[np.int64]

Interval = tuple[float, float]

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


def confusion_matrix(labels: IndexArray, predictions: IndexArray, num_classes: int) -> CountArray:
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


def per_class_recall(confusion: CountArray) -> npt.NDArray[np.float64]:
    """Share of each labelled class that was found, float64 (C,).

    NaN for a class that no image is labelled with. ``confusion`` is that of
    :func:`confusion_matrix`, int64 (C, C), here and below.
    """
    return _ratio(np.diagonal(confusion), confusion.sum(axis=1))


def per_class_precision(confusion: CountArray) -> npt.NDArray[np.float64]:
    """Share of the images predicted as each class that are of it, float64 (C,).

    NaN for a class that is never predicted.
    """
    return _ratio(np.diagonal(confusion), confusion.sum(axis=0))


def per_class_f1(confusion: CountArray) -> npt.NDArray[np.float64]:
    """F1 = 2 TP / (2 TP + FP + FN) of each class, float64 (..., C), from counts (..., C, C).

    NaN for a class that is neither labelled nor predicted anywhere.
    """
    true_positives = np.diagonal(confusion, axis1=-2, axis2=-1)
    # Row sum = TP + FN, column sum = TP + FP.
    return _ratio(2 * true_positives, confusion.sum(axis=-1) + confusion.sum(axis=-2))


def macro_f1(confusion: CountArray) -> float:
    """Mean over classes of F1, every class weighing the same; 0 to 1.

    A class that is neither labelled nor predicted anywhere is left out of the mean, as torchmetrics
    and scikit-learn do; one that is labelled but never predicted, or the other way, counts as 0.
    """
    return float(np.nanmean(per_class_f1(confusion)))


@dataclasses.dataclass(frozen=True)
class BootstrapIntervals:
    """What accuracy and macro-F1 might have been on another sample of as many images.

    Attributes:
        accuracy: Lower and upper end.
        macro_f1: Lower and upper end.
    """

    accuracy: tuple[float, float]
    macro_f1: tuple[float, float]


def bootstrap_intervals(
    confusion: CountArray, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> BootstrapIntervals:
    """Percentile bootstrap intervals over images (Efron 1979).

    Both figures depend on the confusion matrix alone, and drawing N images with replacement draws
    its cells from a multinomial distribution: that is what is drawn.

    Args:
        confusion: int64 (C, C).
        resamples: How many samples of N images are drawn.
        level: Share of the resamples that the interval holds.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    images = int(confusion.sum())
    drawn = generator.multinomial(images, confusion.ravel() / images, size=resamples)
    drawn = drawn.reshape(resamples, *confusion.shape)
    accuracies = np.trace(drawn, axis1=1, axis2=2) / images  # (resamples,)
    mean_f1 = np.nanmean(per_class_f1(drawn), axis=1)  # (resamples,)
    ends = (0.5 - level / 2, 0.5 + level / 2)
    low, high = np.quantile(np.stack((accuracies, mean_f1)), ends, axis=1)  # (2,) each
    return BootstrapIntervals((float(low[0]), float(high[0])), (float(low[1]), float(high[1])))


def share_interval(count: int, images: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); of any width above 0, also at 0 and 1.

    Args:
        count: Images that have the property.
        images: All of them, at least 1.
        level: Of confidence.

    Returns:
        Lower and upper end, 0 to 1.
    """
    if not 0 <= count <= images or images < 1:
        raise ValueError(f"expected a count from 0 to the images, found {count} of {images}")
    z = _quantile(level)
    centre = (count + z**2 / 2) / (images + z**2)
    half = z / (images + z**2) * math.sqrt(count * (images - count) / images + z**2 / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one classifier minus another's on the same images.

    Attributes:
        value: -1 to 1.
        interval: Lower and upper end.
    """

    value: float
    interval: Interval


def paired_accuracy_difference(
    labels: IndexArray, reference: IndexArray, predictions: IndexArray, level: float = 0.95
) -> PairedDifference:
    """How much more accurate one classifier is than another, with an interval over images.

    Only images that exactly one of them has right tell them apart, so the interval is much
    narrower than those of both accuracies. It is Bonett's and Price's adjusted Wald interval
    (2012): one image is added to either side, so that two classifiers that never differ are not
    taken for the same.

    Args:
        labels: Integers (N,).
        reference: Classes that the other one predicts, integers (N,).
        predictions: Classes that this one predicts, integers (N,).
        level: Of confidence.
    """
    _check_indices(labels, reference)
    _check_indices(labels, predictions)
    images = len(labels)
    gained = int(np.sum((predictions == labels) & (reference != labels)))
    lost = int(np.sum((predictions != labels) & (reference == labels)))
    up, down = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    half = _quantile(level) * math.sqrt((up + down - (up - down) ** 2) / (images + 2))
    ends = max(up - down - half, -1.0), min(up - down + half, 1.0)
    return PairedDifference((gained - lost) / images, ends)


def _quantile(level: float) -> float:
    """Standard deviations on either side of the mean that hold ``level`` of a normal variable."""
    return statistics.NormalDist().inv_cdf(0.5 + level / 2)


@dataclasses.dataclass(frozen=True)
class ReliabilityBins:
    """Confidence beside accuracy, in B bins of equal width from 0 to 1.

    Attributes:
        confidence: Mean probability of the predicted class, float64 (B,); NaN in an empty bin.
        accuracy: Share of right predictions, float64 (B,); NaN in an empty bin.
        count: Images, int64 (B,).
    """

    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]


def reliability_bins(
    probabilities: FloatArray, labels: IndexArray, bins: int = 15
) -> ReliabilityBins:
    """Sort the images by the probability of the predicted class into ((b - 1) / B, b / B].

    Args:
        probabilities: Floats (N, C).
        labels: Integers (N,), 0 to C - 1.
        bins: Number of bins B.
    """
    _check_probabilities(probabilities)
    predictions = probabilities.argmax(axis=1)
    _check_indices(labels, predictions, probabilities.shape[1])
    confidence = probabilities.max(axis=1).astype(np.float64)
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    # NaN is sorted behind all numbers: it falls into the last bin and stays NaN there.
    bin_of = np.searchsorted(inner_edges, confidence, side="left")  # (N,)
    count = np.bincount(bin_of, minlength=bins).astype(np.int64)
    right = np.bincount(bin_of, weights=predictions == labels, minlength=bins)
    return ReliabilityBins(
        confidence=_ratio(np.bincount(bin_of, weights=confidence, minlength=bins), count),
        accuracy=_ratio(right, count),
        count=count,
    )


def expected_calibration_error(
    probabilities: FloatArray, labels: IndexArray, bins: int = 15
) -> float:
    """How far a network's confidence is from its accuracy (ECE; Guo et al. 2017, equation 3).

    The mean over images of |accuracy - mean confidence| of their bin.

    Args:
        probabilities: Floats (N, C).
        labels: Integers (N,), 0 to C - 1.
        bins: Number of bins; 15 as in the paper.

    Returns:
        0 (calibrated) to 1.
    """
    found = reliability_bins(probabilities, labels, bins)
    filled = found.count > 0
    gap = np.abs(found.accuracy - found.confidence)[filled]
    return float(np.average(gap, weights=found.count[filled]))


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
    numerator: npt.NDArray[np.number[Any]], denominator: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Quotient, NaN where there is nothing to divide by."""
    result = np.full(denominator.shape, np.nan)
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
