"""Accuracy of every model and precision side by side, on the same images.

Run ``python benchmarks/accuracy.py --data DIR`` from a clone. Agreement, KL and difference in
probability are against one reference: the first PyTorch model, else the first in FP32, else the
first. What every model said of every image is kept beside the result, and ``--compare OLD.json``
sets a second run beside an older one image by image.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.accuracy", "cpu,bench")

import numpy as np

from benchmarks.measure.models import (
    CANNOT_RUN,
    Candidate,
    Skipped,
    choose_backends,
    choose_reference,
    find_models,
    one_line,
    open_candidates,
    require_candidates,
)
from benchmarks.report.compare import PREDICTIONS, compare, read_older, write_predictions
from benchmarks.report.publish import (
    check_out,
    console,
    out_option,
    publish,
    require_libraries,
    show_comparison,
)
from benchmarks.report.result import Result, Row, default_folder, new_result
from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import DatasetError, ImageError
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.workbench import evaluation
from efficientface_deploy.workbench.dataset import Dataset, Sample, image_list_hash, read_dataset
from efficientface_deploy.workbench.evaluation import Differences, Scores
from efficientface_deploy.workbench.metrics import IndexArray


@dataclasses.dataclass(frozen=True)
class AccuracyConfig:
    """Options of ``python benchmarks/accuracy.py``."""

    data: Path = option(metavar="DIR", help="a prepared data set", first=True)
    models: tuple[Path, ...] = option(
        (),
        positional=True,
        metavar="MODEL",
        help="model files or folders (default: the bundled models and those under artifacts/)",
        first=True,
    )
    preset: str | None = option(
        None,
        metavar="NAME",
        help="what numbered folders mean, without dataset.json, and what published checkpoints "
        "were trained on",
    )
    split: str | None = option(
        None, metavar="NAME", help="default: validation where there is one, else test"
    )
    backends: str = option(
        "", metavar="NAME,...", help="e.g. onnx:cpu,torch (default: all that this machine has)"
    )
    compare: Path | None = option(
        None, metavar="OLD", help="an older accuracy.json, with its predictions.npz beside it"
    )
    out: Path | None = out_option()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/accuracy.py``."""
    config = parse_config(
        AccuracyConfig,
        argv,
        prog="python benchmarks/accuracy.py",
        description=__doc__ or "",
        example="artifacts --data data/ferplus",
    )
    # Before the work rather than after it.
    require_libraries()
    check_out(config.out, "accuracy")
    if config.compare is not None:
        read_older(config.compare, "accuracy")
    result, predictions = run(config)
    folder = config.out or default_folder(result)
    write_predictions(folder / PREDICTIONS, **predictions)
    written = publish(result, folder)
    if config.compare is not None:
        show_comparison(compare(config.compare, written), console())
    return 0


def run(config: AccuracyConfig) -> tuple[Result, dict[str, Any]]:
    """Evaluate every model on every image.

    Returns:
        The result, and what :func:`write_predictions` keeps.

    Raises:
        EfficientFaceError: The data set or an image cannot be used, or no model runs here.
    """
    backends = choose_backends(config.backends)
    dataset = read_dataset(config.data, config.preset)
    split = config.split or dataset.evaluation_split()
    samples = dataset.split(split)
    labels = evaluation.labels_of(samples)
    digest = image_list_hash(samples, dataset.root)
    result = new_result("accuracy", config)
    found: dict[Candidate, Float32Array] = {}
    models = find_models(config.models)
    with open_candidates(models, backends, preset=config.preset) as (candidates, skipped):
        for entry in candidates:
            try:
                found[entry] = predict(entry, dataset, samples)
            except ImageError:
                raise
            except CANNOT_RUN as error:
                skipped.append(Skipped(entry.backend, entry.model, one_line(error)))
        require_candidates(list(found), skipped)
        reference = choose_reference(list(found))
        rows = [
            {"model": entry.model, "backend": entry.backend}
            | {key: value for key, value in entry.describe().items() if key != "name"}
            | score(own, labels, found[reference])
            for entry, own in found.items()
        ]
    counts = np.bincount(labels, minlength=len(dataset.labels)).tolist()
    described = {
        **result,
        "data": {
            "name": dataset.name,
            "split": split,
            "labels": list(dataset.labels),
            "images": len(samples),
            "images_per_class": counts,
            "images_sha256": digest,
        },
        "reference": f"{reference.model} on {reference.backend}",
        "rows": rows,
        "absent": [dataclasses.asdict(entry) for entry in skipped],
        "warnings": warnings(rows) + _empty_classes(counts, dataset.labels),
    }
    return described, {
        "images_sha256": digest,
        "images": [sample.path.relative_to(dataset.root).as_posix() for sample in samples],
        "labels": labels,
        "probabilities": {f"{own.model} on {own.backend}": found[own] for own in found},
    }


def predict(candidate: Candidate, dataset: Dataset, samples: Sequence[Sample]) -> Float32Array:
    """Probabilities of a model for N images, float32 (N, C), columns in the data set's order.

    Raises:
        DatasetError: The model knows other classes.
        ImageError: An image cannot be read.
    """
    predictor = candidate.predictor
    labels = predictor.spec.labels
    if set(labels) != set(dataset.labels):
        expected = f"those of {dataset.name} ({', '.join(dataset.labels)})"
        fix = "give a model that was trained on these classes"
        raise DatasetError("labels", expected, ", ".join(labels), fix)

    def infer(images: UInt8Array) -> Float32Array:
        probabilities: Float32Array = predictor.infer(images)[1]
        return probabilities

    own = evaluation.predict(infer, samples, predictor.spec, candidate.model)
    return own[:, [labels.index(label) for label in dataset.labels]]


def score(probabilities: Float32Array, labels: IndexArray, reference: Float32Array) -> Row:
    """The metrics' part of a row.

    Args:
        probabilities: float32 (N, C).
        labels: Integers (N,).
        reference: Probabilities of the reference, float32 (N, C).
    """
    scores = Scores.of(labels, probabilities)
    apart = Differences.of(reference, probabilities, labels)
    assert apart.accuracy is not None
    per_class = scores.per_class
    return {
        **scores.summary,
        "ece": scores.ece,
        "agreement": apart.agreement,
        "agreement_interval": apart.agreement_interval,
        "difference": dataclasses.asdict(apart.accuracy),
        "mean_kl": apart.mean_kl,
        "max_probability_difference": apart.largest,
        "recall": per_class["recall"],
        "precision_per_class": per_class["precision"],
        "f1": per_class["f1"],
        "confusion": scores.confusion.tolist(),
    }


def _empty_classes(counts: Sequence[int], labels: Sequence[str]) -> list[str]:
    missing = evaluation.none_of(counts, labels)
    return [f"images of each class{missing}: no score speaks of those"] if missing else []


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    found = [
        f"{row['model']} has preliminary weights, which are meant to be replaced"
        for row in rows
        if row["preliminary"]
    ]
    if len(networks) > 1:
        found.append(
            f"different networks ({', '.join(networks)}): agreement with the reference says how "
            "much they differ, not what a precision costs"
        )
    return list(dict.fromkeys(found))
