"""Score a model on a prepared data set: accuracy, macro-F1, calibration, and every class.

``python -m training.evaluate --weights runs/student/student.safetensors --data data/ferplus
--out runs/evaluation``
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efficientface_deploy.artifact import require_preset
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError, DatasetError
from efficientface_deploy.files import file_hash, write_text
from efficientface_deploy.predictor import Predictor, load
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.dataset import (
    DESCRIPTION,
    Dataset,
    Sample,
    iterate_batches,
    label_distributions,
    read_dataset,
)
from efficientface_deploy.workbench.metrics import (
    accuracy,
    bootstrap_intervals,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    mean_kl,
    per_class_f1,
    per_class_precision,
    per_class_recall,
    reliability_bins,
)
from efficientface_deploy.workbench.progress import track
from efficientface_deploy.workbench.tables import escaped, table
from efficientface_deploy.workbench.workspace import check_writable
from training.plots import plot_confusion, plot_reliability
from training.trainer.loader import HOLDOUT, hold_out
from training.trainer.targets import Blend

BATCH = 64
BINS = 15
RESAMPLES = 2000
LEVEL = 0.95
SEED = 0

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Options of ``training.evaluate``."""

    weights: Path = option(help="checkpoint or exported model")
    data: Path = option(help="a prepared data set")
    split: str | None = option(
        None,
        choices=("train", "validation", "test", HOLDOUT),
        help="default: validation where there is one, else test; holdout is the tenth of train "
        "that chose the epochs of the training",
    )
    seed: int | None = option(
        None, minimum=0, help="of the training, for --split holdout; default: what the file says"
    )
    preset: str | None = option(
        None,
        help="what a published checkpoint was trained on, and what numbered folders mean, without "
        "dataset.json",
    )
    out: Path | None = option(
        None,
        metavar="DIR",
        help="write evaluation.json, evaluation.md, confusion.png and reliability.png there",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.evaluate``."""
    config = parse_config(
        EvaluateConfig, argv, prog="python -m training.evaluate", description=__doc__ or ""
    )
    check_writable(config.out)
    require_preset(config.weights, config.preset)
    dataset = _read_dataset(config)
    split = config.split or dataset.evaluation_split()
    with load(config.weights, preset=config.preset) as predictor:
        check_labels(predictor, dataset)
        seed = holdout_seed(predictor, config.seed) if split == HOLDOUT else 0
        samples = samples_of(dataset, split, seed)
        probabilities = predict_samples(predictor, samples)
        described = repr(predictor)
        temperature = kept_temperature(predictor)
    figures = {
        "weights": str(config.weights),
        "weights_sha256": file_hash(config.weights),
        "model": described,
        "dataset": dataset.name,
        "split": split,
        **score(probabilities, samples, dataset.labels),
    }
    if temperature is not None:
        scaled = Blend(temperature)(torch.from_numpy(probabilities), torch.empty(0)).numpy()
        figures["temperature"] = temperature
        figures["scaled"] = score_confidence(scaled, samples)
    print(as_text(figures))
    if config.out is not None:
        write_evaluation(config.out, figures)
        print(f"wrote evaluation.json, evaluation.md and two plots to {config.out}")
    return 0


def samples_of(dataset: Dataset, split: str, seed: int) -> Sequence[Sample]:
    """A split, or the tenth of train that a training with this seed held out."""
    return hold_out(dataset.split("train"), seed)[1] if split == HOLDOUT else dataset.split(split)


def holdout_seed(predictor: Predictor, given: int | None) -> int:
    """The seed with which a training held out a tenth of train.

    Args:
        predictor: The model, which may say how it was trained.
        given: What the user says.

    Raises:
        ConfigError: It was trained on those images.
    """
    record = predictor.provenance
    select, seed = record.get("select"), record.get("seed", 0)
    if select is None:  # it does not say
        return int(seed if given is None else given)
    if select != HOLDOUT or given not in (None, seed):
        raise ConfigError(
            "--split holdout",
            "images that the model was not trained on",
            f"a model of --select {select} --seed {seed}",
            "leave --seed out" if select == HOLDOUT else "choose another --split",
        )
    return int(seed)


def check_labels(predictor: Predictor, dataset: Dataset) -> None:
    """Refuse a model of other classes, or in another order.

    Raises:
        DatasetError: It is one.
    """
    if predictor.spec.labels != dataset.labels:
        raise DatasetError(
            dataset.root,
            "the model's labels: " + ", ".join(predictor.spec.labels),
            ", ".join(dataset.labels),
            "give the data set that the model was trained for",
        )


def kept_temperature(predictor: Predictor) -> float | None:
    """The temperature that its training found and left out of its weights, as for an LDG."""
    found = predictor.provenance.get("calibration", {})
    return None if found.get("folded", True) else float(found["temperature"])


def predict_samples(predictor: Predictor, samples: Sequence[Sample]) -> Float32Array:
    """Probabilities float32 (N, C) of the samples, in order."""
    batches = iterate_batches(samples, predictor.spec, BATCH)
    total = (len(samples) + BATCH - 1) // BATCH
    parts = [predictor.infer(images)[1] for images, _ in track(batches, "evaluating", total)]
    return np.concatenate(parts)


def score(probabilities: Float32Array, samples: Sequence[Sample], labels: Sequence[str]) -> Figures:
    """All figures of one evaluation, ready for JSON: what is not defined is None.

    Args:
        probabilities: float32 (N, C).
        samples: N samples with their labels and, where people voted, votes.
        labels: C class names.
    """
    truth = np.array([sample.label for sample in samples])
    predicted = probabilities.argmax(axis=1)
    classes = len(labels)
    intervals = bootstrap_intervals(
        truth, predicted, classes, resamples=RESAMPLES, level=LEVEL, seed=SEED
    )
    images = np.bincount(truth, minlength=classes)
    per_class = zip(
        labels,
        images.tolist(),
        _without_nan(per_class_precision(truth, predicted, classes)),
        _without_nan(per_class_recall(truth, predicted, classes)),
        _without_nan(per_class_f1(truth, predicted, classes)),
        strict=True,
    )
    bins = reliability_bins(probabilities, truth, BINS)
    figures: Figures = {
        "images": len(samples),
        "accuracy": accuracy(truth, predicted),
        "accuracy_interval": list(intervals.accuracy),
        "macro_f1": macro_f1(truth, predicted, classes),
        "macro_f1_interval": list(intervals.macro_f1),
        "interval": {
            "method": "percentile bootstrap over images",
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": SEED,
        },
        "largest_class": float(images.max() / len(truth)),
        **score_confidence(probabilities, samples),
        "classes": [
            {"label": label, "images": count, "precision": precision, "recall": recall, "f1": f1}
            for label, count, precision, recall, f1 in per_class
        ],
        "confusion_matrix": confusion_matrix(truth, predicted, classes).tolist(),
        "reliability": {
            "confidence": _without_nan(bins.confidence),
            "accuracy": _without_nan(bins.accuracy),
            "count": bins.count.tolist(),
        },
    }
    return figures


def score_confidence(probabilities: Float32Array, samples: Sequence[Sample]) -> dict[str, float]:
    """How far probabilities float32 (N, C) are from accuracy and, where people voted, from them."""
    truth = np.array([sample.label for sample in samples])
    figures = {"expected_calibration_error": expected_calibration_error(probabilities, truth, BINS)}
    if samples[0].votes is not None:
        votes = label_distributions(samples, probabilities.shape[1])
        figures["mean_kl_from_votes"] = mean_kl(votes, probabilities)
    return figures


def as_text(figures: Figures) -> str:
    """The figures for a terminal."""
    width = max(len(row["label"]) for row in figures["classes"])
    lines = [
        figures["model"],
        _described_data(figures),
        f"  accuracy          {figures['accuracy']:.4f}   {_interval(figures, 'accuracy')}"
        f"   (always the largest class: {figures['largest_class']:.4f})",
        f"  macro-F1          {figures['macro_f1']:.4f}   {_interval(figures, 'macro_f1')}",
        f"  calibration error {figures['expected_calibration_error']:.4f}   (ECE, {BINS} bins)",
    ]
    if "mean_kl_from_votes" in figures:
        lines.append(f"  KL from the votes {figures['mean_kl_from_votes']:.4f}   (nats, mean)")
    if "temperature" in figures:
        lines.append(
            f"  at temperature {figures['temperature']:.3f}: "
            + ", ".join(f"{name} {value:.4f}" for name, value in _scaled(figures))
        )
    lines.append(f"  {'class':<{width}}  images  precision  recall      F1")
    lines += [
        f"  {row['label']:<{width}}  {row['images']:6d}  {_share(row['precision']):>9}  "
        f"{_share(row['recall']):>6}  {_share(row['f1']):>6}"
        for row in figures["classes"]
    ]
    return "\n".join(lines)


def as_markdown(figures: Figures) -> str:
    """The figures as a page, with the plots that lie beside it."""
    rows = [
        ("accuracy", f"{figures['accuracy']:.4f}", _interval(figures, "accuracy")),
        ("macro-F1", f"{figures['macro_f1']:.4f}", _interval(figures, "macro_f1")),
        (f"ECE, {BINS} bins", f"{figures['expected_calibration_error']:.4f}", ""),
    ]
    if "mean_kl_from_votes" in figures:
        rows.append(("KL from the votes, nats", f"{figures['mean_kl_from_votes']:.4f}", ""))
    if "temperature" in figures:
        at = f" at temperature {figures['temperature']:.3f}"
        rows += [(name + at, f"{value:.4f}", "") for name, value in _scaled(figures)]
    classes = [
        (row["label"], row["images"], *(_share(row[key]) for key in ("precision", "recall", "f1")))
        for row in figures["classes"]
    ]
    percent = round(100 * LEVEL)
    return "\n\n".join(
        (
            f"# Evaluation of {escaped(Path(figures['weights']).name)}",
            f"{escaped(figures['model'])}, sha256 `{figures['weights_sha256'][:12]}`, on "
            f"{escaped(_described_data(figures))}. Always the largest class: "
            f"{figures['largest_class']:.4f}.",
            table(("", "value", f"{percent} % interval"), rows),
            f"Intervals: percentile bootstrap over images, {RESAMPLES} resamples, seed {SEED}.",
            table(("class", "images", "precision", "recall", "F1"), classes),
            "`-`: not defined, since the class is never predicted (precision) or has no images "
            "(recall).",
            "![Confusion matrix](confusion.png)",
            "![Reliability](reliability.png)\n",
        )
    )


def write_evaluation(folder: Path, figures: Figures) -> None:
    """Write ``evaluation.json``, ``evaluation.md``, ``confusion.png`` and ``reliability.png``."""
    labels = [row["label"] for row in figures["classes"]]
    plot_confusion(folder / "confusion.png", figures["confusion_matrix"], labels)
    plot_reliability(
        folder / "reliability.png",
        figures["reliability"],
        figures["expected_calibration_error"],
    )
    write_text(folder / "evaluation.md", as_markdown(figures))
    text = json.dumps(figures, indent=2, allow_nan=False)
    write_text(folder / "evaluation.json", text + "\n")


def _read_dataset(config: EvaluateConfig) -> Dataset:
    """The data set; where it says itself what its classes are, the preset is the checkpoint's."""
    described = (config.data / DESCRIPTION).is_file()
    return read_dataset(config.data, None if described else config.preset)


def _scaled(figures: Figures) -> list[tuple[str, float]]:
    names = {"expected_calibration_error": "ECE", "mean_kl_from_votes": "KL from the votes"}
    return [(names[key], value) for key, value in figures["scaled"].items()]


def _without_nan(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _described_data(figures: Figures) -> str:
    return f"{figures['dataset']}, {figures['split']}, {figures['images']:,} images"


def _interval(figures: Figures, name: str) -> str:
    low, high = figures[f"{name}_interval"]
    return f"{low:.4f} to {high:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    run_command(main)
