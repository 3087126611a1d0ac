"""A data set through a model, and what came of it: scores, and differences from another model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientface_deploy.errors import DatasetError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.workbench import metrics
from efficientface_deploy.workbench.dataset import Dataset, Sample, iterate_batches
from efficientface_deploy.workbench.metrics import CountArray, IndexArray, Interval
from efficientface_deploy.workbench.progress import track

BATCH = 64  # images of one call, so that memory has a bound
BINS = 15  # of the calibration error, as in Guo et al. 2017

Infer = Callable[[UInt8Array], Float32Array]
"""uint8 (B, S, S, 3) RGB -> float32 (B, C), logits or probabilities."""


def predict(
    infer: Infer, samples: Sequence[Sample], spec: ModelSpec, title: str = ""
) -> Float32Array:
    """What a model gives for the images of a data set, in order, by the runtime's preprocessing.

    Args:
        infer: The model.
        samples: N images.
        spec: The model's.
        title: Of the progress bar on a terminal; empty for none.

    Returns:
        float32 (N, C), logits or probabilities as ``infer`` gives them.

    Raises:
        ImageError: An image cannot be read.
    """
    batches = iterate_batches(samples, spec, BATCH)
    if title:
        batches = track(batches, title, math.ceil(len(samples) / BATCH))
    none = np.empty((0, spec.num_classes), np.float32)
    return np.concatenate([none, *(infer(images) for images, _ in batches)])


def run_in_batches(infer: Infer, images: UInt8Array) -> Float32Array:
    """The same for images uint8 (N, S, S, 3) that are in memory."""
    return np.concatenate([infer(images[at : at + BATCH]) for at in range(0, len(images), BATCH)])


def softmax(logits: Float32Array) -> Float32Array:
    """Probabilities (N, C) of logits (N, C)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Float32Array = shifted.astype(np.float32, copy=False)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities


def labels_of(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """The labels of N samples, int64 (N,)."""
    return np.array([sample.label for sample in samples], dtype=np.int64)


def none_of(counts: Sequence[int], labels: Sequence[str]) -> str:
    """``, none of Fear, Contempt`` for classes without an image, of which scores say nothing.

    Args:
        counts: Images of each class.
        labels: Class names.

    Returns:
        What follows the number of images, empty where there are some of each class.
    """
    missing = [label for label, count in zip(labels, counts, strict=True) if not count]
    return f", none of {', '.join(missing)}" if missing else ""


def check_labels(spec: ModelSpec, dataset: Dataset) -> None:
    """Refuse a model of other classes, or in another order.

    Raises:
        DatasetError: It is one.
    """
    if spec.labels != dataset.labels:
        raise DatasetError(
            dataset.root,
            "the model's labels: " + ", ".join(spec.labels),
            ", ".join(dataset.labels),
            "give the data set that the model was trained for",
        )


@dataclasses.dataclass(frozen=True)
class Scores:
    """How good a model is on N labelled images of C classes.

    Attributes:
        images: N.
        accuracy: 0 to 1.
        macro_f1: 0 to 1.
        ece: Expected calibration error, 0 to 1.
        confusion: int64 (C, C); row = label, column = prediction.
        reliability: Confidence beside accuracy, in bins.
    """

    images: int
    accuracy: float
    macro_f1: float
    ece: float
    confusion: CountArray
    reliability: metrics.ReliabilityBins

    @classmethod
    def of(cls, labels: IndexArray, probabilities: Float32Array) -> Scores:
        """Score probabilities float32 (N, C) by labels, integers (N,)."""
        classes = probabilities.shape[1]
        confusion = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), classes)
        return cls(
            images=len(labels),
            accuracy=float(np.trace(confusion)) / len(labels),
            macro_f1=metrics.macro_f1(confusion),
            ece=metrics.expected_calibration_error(probabilities, labels, BINS),
            confusion=confusion,
            reliability=metrics.reliability_bins(probabilities, labels, BINS),
        )

    @property
    def accuracy_interval(self) -> Interval:
        """Wilson's interval of the accuracy, 95 %."""
        return metrics.share_interval(int(np.trace(self.confusion)), self.images)

    @functools.cached_property
    def bootstrap(self) -> metrics.BootstrapIntervals:
        """Intervals of accuracy and macro-F1 by the bootstrap over images, 95 %."""
        return metrics.bootstrap_intervals(self.confusion)

    @property
    def summary(self) -> dict[str, float | Interval]:
        """Accuracy and macro-F1, each with its interval, as results have them."""
        return {
            "accuracy": self.accuracy,
            "accuracy_interval": self.accuracy_interval,
            "macro_f1": self.macro_f1,
            "macro_f1_interval": self.bootstrap.macro_f1,
        }

    @property
    def per_class(self) -> dict[str, list[float | None]]:
        """``precision``, ``recall`` and ``f1`` of each class; None where it is not defined."""
        return {
            "precision": without_nan(metrics.per_class_precision(self.confusion)),
            "recall": without_nan(metrics.per_class_recall(self.confusion)),
            "f1": without_nan(metrics.per_class_f1(self.confusion)),
        }


@dataclasses.dataclass(frozen=True)
class Differences:
    """How far a model's probabilities are from a reference's, on the same N images.

    Attributes:
        agreement: Share of images with the same most probable class.
        agreement_interval: Wilson's interval of it, 95 %.
        mean_kl: Mean of KL(reference || model), nats.
        largest: Largest difference in any probability.
        accuracy: The model's accuracy minus the reference's; None without labels.
    """

    agreement: float
    agreement_interval: Interval
    mean_kl: float
    largest: float
    accuracy: metrics.PairedDifference | None

    @classmethod
    def of(
        cls,
        reference: Float32Array,
        probabilities: Float32Array,
        labels: IndexArray | None = None,
    ) -> Differences:
        """Compare probabilities, float32 (N, C) both."""
        agreement = metrics.top1_agreement(reference, probabilities)
        images = len(reference)
        accuracy = None
        if labels is not None:
            accuracy = metrics.paired_accuracy_difference(
                labels, reference.argmax(axis=1), probabilities.argmax(axis=1)
            )
        return cls(
            agreement,
            metrics.share_interval(round(agreement * images), images),
            metrics.mean_kl(reference, probabilities),
            metrics.max_probability_difference(reference, probabilities),
            accuracy,
        )


def without_nan(values: npt.NDArray[np.floating[Any]]) -> list[float | None]:
    """Values for JSON, which has no NaN: None stands for it."""
    return [None if math.isnan(value) else value for value in values.tolist()]
