"""Score a model on a prepared data set: accuracy, macro-F1, calibration, and every class.

``python -m training.evaluate --weights runs/student/student.safetensors --data data/ferplus``
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efficientface_deploy.artifact import write_text
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.dataset import (
    Sample,
    iterate_batches,
    label_distributions,
    read_dataset,
)
from efficientface_deploy.errors import DatasetError
from efficientface_deploy.metrics import (
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    mean_kl,
    per_class_recall,
)
from efficientface_deploy.predictor import Predictor, load
from efficientface_deploy.preprocess import Float32Array
from training.progress import track

BATCH = 64


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Options of ``training.evaluate``."""

    weights: Path = option(help="checkpoint or exported model")
    data: Path = option(help="a prepared data set")
    split: str | None = option(
        None,
        choices=("train", "validation", "test"),
        help="default: validation where there is one, else test",
    )
    preset: str | None = option(None, help="what numbered folders mean, without dataset.json")
    json: Path | None = option(None, help="also write the figures to this file")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.evaluate``."""
    config = parse_config(
        EvaluateConfig, argv, prog="python -m training.evaluate", description=__doc__ or ""
    )
    dataset = read_dataset(config.data, config.preset)
    split = config.split or dataset.evaluation_split()
    samples = dataset.split(split)
    with load(config.weights) as predictor:
        if predictor.spec.labels != dataset.labels:
            raise DatasetError(
                config.data,
                expected="the model's labels: " + ", ".join(predictor.spec.labels),
                found=", ".join(dataset.labels),
                fix="give the data set that the model was trained for",
            )
        probabilities = predict_samples(predictor, samples)
        described = repr(predictor)
    figures = score(probabilities, samples, dataset.labels)
    print(f"{described}\n{dataset.name}, {split}, {len(samples):,} images")
    print(as_text(figures))
    if config.json is not None:
        record = {"weights": str(config.weights), "dataset": dataset.name, "split": split}
        write_text(config.json, json.dumps({**record, **figures}, indent=2) + "\n")
    return 0


def predict_samples(predictor: Predictor, samples: Sequence[Sample]) -> Float32Array:
    """Probabilities float32 (N, C) of the samples, in order."""
    batches = iterate_batches(samples, predictor.spec, BATCH)
    total = (len(samples) + BATCH - 1) // BATCH
    parts = [predictor.infer(images)[1] for images, _ in track(batches, "evaluating", total)]
    return np.concatenate(parts)


def score(
    probabilities: Float32Array, samples: Sequence[Sample], labels: Sequence[str]
) -> dict[str, object]:
    """All figures of one evaluation, ready for JSON.

    Args:
        probabilities: float32 (N, C).
        samples: N samples with their labels and, where people voted, votes.
        labels: C class names.
    """
    truth = np.array([sample.label for sample in samples])
    predicted = probabilities.argmax(axis=1)
    classes = len(labels)
    recall = per_class_recall(truth, predicted, classes)
    figures: dict[str, object] = {
        "images": len(samples),
        "accuracy": accuracy(truth, predicted),
        "macro_f1": macro_f1(truth, predicted, classes),
        "expected_calibration_error": expected_calibration_error(probabilities, truth),
        "largest_class": float(np.bincount(truth).max() / len(truth)),
        "recall": {
            label: None if np.isnan(value) else float(value)
            for label, value in zip(labels, recall, strict=True)
        },
        "confusion_matrix": confusion_matrix(truth, predicted, classes).tolist(),
    }
    if samples[0].votes is not None:
        votes = label_distributions(samples, classes)
        figures["mean_kl_from_votes"] = mean_kl(votes, probabilities)
    return figures


def as_text(figures: dict[str, object]) -> str:
    """The figures for a terminal."""
    recall = figures["recall"]
    assert isinstance(recall, dict)
    lines = [
        f"  accuracy          {figures['accuracy']:.4f}"
        f"   (always the largest class: {figures['largest_class']:.4f})",
        f"  macro-F1          {figures['macro_f1']:.4f}",
        f"  calibration error {figures['expected_calibration_error']:.4f}   (ECE, 15 bins)",
    ]
    if "mean_kl_from_votes" in figures:
        lines.append(f"  KL from the votes {figures['mean_kl_from_votes']:.4f}   (nats, mean)")
    lines += [
        f"  recall {label:<10} {'none here' if value is None else format(value, '.4f')}"
        for label, value in recall.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
