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

import numpy as np

from benchmarks.measure.models import (
    CANNOT_RUN,
    Candidate,
    Skipped,
    choose_backends,
    find_models,
    one_line,
    open_candidates,
    require_candidates,
)
from benchmarks.report.compare import PREDICTIONS, Predictions, compare
from benchmarks.report.publish import console, publish, require_libraries, show_comparison
from benchmarks.report.result import Row, default_folder, new_result, read_result
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ImageError
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.workbench import evaluation
from efficientface_deploy.workbench.dataset import Dataset, Sample, image_list_hash, read_dataset
from efficientface_deploy.workbench.evaluation import Differences, Scores
from efficientface_deploy.workbench.metrics import IndexArray


@dataclasses.dataclass(frozen=True)
class AccuracyConfig:
    """Options of ``python benchmarks/accuracy.py``."""

    data: Path = option(metavar="DIR", help="a prepared data set")
    models: tuple[Path, ...] = option(
        (),
        positional=True,
        metavar="MODEL",
        help="model files or folders (default: the bundled models and those under artifacts/)",
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
    out: Path | None = option(
        None, metavar="DIR", help="folder of the result (default: a new one in benchmarks/results)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/accuracy.py``."""
    config = parse_config(
        AccuracyConfig,
        argv,
        prog="benchmarks/accuracy.py",
        description="Put the accuracy of every model and precision side by side.",
    )
    require_libraries()
    if config.compare is not None:
        read_result(config.compare)  # before the work rather than after it
    result, predictions = run(config)
    folder = config.out or default_folder(result)
    predictions.write(folder / PREDICTIONS)
    written = publish(result, folder)
    if config.compare is not None:
        show_comparison(compare(config.compare, written), console())
    return 0


def run(config: AccuracyConfig) -> tuple[dict[str, Any], Predictions]:
    """Evaluate, and give the result as a JSON object, and every model's predictions.

    Raises:
        EfficientFaceError: The data set cannot be used, or no model runs here.
    """
    backends = choose_backends(config.backends)
    dataset = read_dataset(config.data, config.preset)
    split = config.split or dataset.evaluation_split()
    samples = dataset.split(split)
    labels = evaluation.labels_of(samples)
    result = new_result("accuracy", config)
    models = find_models(config.models)
    with open_candidates(models, backends, preset=config.preset) as (opened, skipped):
        candidates, strangers = with_labels_of(dataset, opened)
        skipped += strangers
        require_candidates(candidates, skipped)
        print(f"evaluating {len(candidates)} rows, {len(samples)} images each", file=sys.stderr)
        probabilities, failed = predict(candidates, dataset, samples)
        skipped += failed
        require_candidates(list(probabilities), skipped)
        reference = choose_reference(list(probabilities))
        rows = [
            {**describe(entry), **score(own, labels, probabilities[reference])}
            for entry, own in probabilities.items()
        ]
    digest = image_list_hash(samples, dataset.root)
    described = {
        **result,
        "data": {
            "name": dataset.name,
            "split": split,
            "labels": list(dataset.labels),
            "images": len(samples),
            "images_per_class": np.bincount(labels, minlength=len(dataset.labels)).tolist(),
            "images_sha256": digest,
        },
        "reference": f"{reference.model} on {reference.backend}",
        "rows": rows,
        "absent": [dataclasses.asdict(entry) for entry in skipped],
        "warnings": warnings(rows),
    }
    images = [sample.path.relative_to(dataset.root).as_posix() for sample in samples]
    named = {f"{entry.model} on {entry.backend}": own for entry, own in probabilities.items()}
    return described, Predictions.of(digest, images, labels, named)


def with_labels_of(
    dataset: Dataset, candidates: Sequence[Candidate]
) -> tuple[list[Candidate], list[Skipped]]:
    """Keep the models that know the data set's classes, in whatever order."""
    fitting, strangers = [], []
    for candidate in candidates:
        labels = candidate.predictor.spec.labels
        if set(labels) == set(dataset.labels):
            fitting.append(candidate)
        else:
            reason = (
                f"labels: expected those of {dataset.name} ({', '.join(dataset.labels)}), "
                f"found {', '.join(labels)}; give a model that was trained on these classes"
            )
            strangers.append(Skipped(candidate.backend, candidate.model, reason))
    return fitting, strangers


def predict(
    candidates: Sequence[Candidate], dataset: Dataset, samples: Sequence[Sample]
) -> tuple[dict[Candidate, Float32Array], list[Skipped]]:
    """Probabilities of every model for every image.

    Args:
        candidates: Models with the data set's labels.
        dataset: Gives the order of the classes.
        samples: N images.

    Returns:
        Per model float32 (N, C), columns in the data set's order; and the models that failed.

    Raises:
        ImageError: An image cannot be read.
    """
    found: dict[Candidate, Float32Array] = {}
    failed: list[Skipped] = []
    for entry in candidates:
        spec = entry.predictor.spec

        def infer(images: UInt8Array, predictor: Any = entry.predictor) -> Float32Array:
            probabilities: Float32Array = predictor.infer(images)[1]
            return probabilities

        try:
            own = evaluation.predict(infer, samples, spec, entry.model)
        except ImageError:
            raise
        except CANNOT_RUN as error:
            failed.append(Skipped(entry.backend, entry.model, one_line(error)))
        else:
            found[entry] = own[:, [spec.labels.index(label) for label in dataset.labels]]
    return found, failed


def choose_reference(candidates: Sequence[Candidate]) -> Candidate:
    """The first PyTorch model, else the first in FP32, else the first."""
    torch = [entry for entry in candidates if entry.backend.startswith("torch")]
    fp32 = [entry for entry in candidates if entry.precision == "fp32"]
    return [*torch, *fp32, *candidates][0]


def describe(candidate: Candidate) -> Row:
    """The model's part of a row."""
    described = candidate.describe()
    return {"model": described.pop("name"), "backend": candidate.backend, **described}


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
        "accuracy": scores.accuracy,
        "accuracy_interval": scores.accuracy_interval,
        "macro_f1": scores.macro_f1,
        "macro_f1_interval": scores.bootstrap.macro_f1,
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


if __name__ == "__main__":
    run_command(main)
