"""Accuracy of every model and precision side by side, on the same images.

Run ``python benchmarks/accuracy.py --data DIR`` from a clone. Every image is decoded once and given
to all models; agreement, KL and difference in probability are against one reference: the first
PyTorch model, else the first in FP32, else the first. What every model said of every image is kept
beside the result, and ``--compare OLD.json`` sets a second run beside an older one image by image.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.measure.models import (
    CANNOT_RUN,
    Absent,
    Contender,
    choose_backends,
    find_models,
    one_line,
    open_contenders,
    require_contenders,
)
from benchmarks.predictions import NAME as PREDICTIONS
from benchmarks.predictions import Predictions, keep, write_predictions
from benchmarks.report.__main__ import read_result, show_comparison, write_result
from benchmarks.report.compare import compare
from benchmarks.report.result import default_folder, new_result
from benchmarks.report.tables import console, require_libraries, show
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, load_image, resize
from efficientface_deploy.workbench.dataset import Dataset, Sample, image_list_hash, read_dataset
from efficientface_deploy.workbench.evaluation import Differences, Scores
from efficientface_deploy.workbench.metrics import IndexArray

_CHUNK = 32  # images decoded at a time: enough to keep a GPU busy, little memory at any size


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
    backends: str | None = option(
        None, metavar="NAME,...", help="e.g. onnx:cpu,torch (default: all that this machine has)"
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
    result, kept = run(config)
    folder = config.out or default_folder(result)
    write_predictions(folder / PREDICTIONS, kept)
    write_result(result, folder / "accuracy.json")
    output = console()
    show(result, output)
    output.print(f"wrote accuracy.json and {PREDICTIONS} to {folder}", markup=False)
    if config.compare is not None:
        show_comparison(compare(config.compare, folder / "accuracy.json"), output)
    return 0


def run(config: AccuracyConfig) -> tuple[dict[str, Any], Predictions]:
    """Evaluate, and give the result as a JSON object, and every model's predictions.

    Raises:
        EfficientFaceError: The data set cannot be used, or no model runs here.
    """
    backends = choose_backends(config.backends or "")
    dataset = read_dataset(config.data, config.preset)
    split = config.split or dataset.evaluation_split()
    samples = dataset.split(split)
    result = new_result("accuracy", config)
    models = find_models(config.models)
    with open_contenders(models, backends, preset=config.preset) as (opened, absent):
        contenders, strangers = with_labels_of(dataset, opened)
        absent += strangers
        require_contenders(contenders, absent)
        print(f"evaluating {len(contenders)} rows, {len(samples)} images each", file=sys.stderr)
        probabilities, failed = predict(contenders, dataset, samples)
        absent += failed
        contenders = [entry for entry in contenders if entry in probabilities]
        require_contenders(contenders, absent)
        reference = choose_reference(contenders)
        labels = np.array([sample.label for sample in samples])
        rows = [
            {
                **describe_model(entry),
                **score(probabilities[entry], labels, probabilities[reference]),
            }
            for entry in contenders
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
        "absent": [dataclasses.asdict(entry) for entry in absent],
        "warnings": warnings(rows),
    }
    images = [sample.path.relative_to(dataset.root).as_posix() for sample in samples]
    named = {f"{entry.model} on {entry.backend}": probabilities[entry] for entry in contenders}
    return described, keep(digest, images, labels, named)


def with_labels_of(
    dataset: Dataset, contenders: Sequence[Contender]
) -> tuple[list[Contender], list[Absent]]:
    """Keep the models that know the data set's classes, in whatever order."""
    fitting, strangers = [], []
    for contender in contenders:
        labels = contender.predictor.spec.labels
        if set(labels) == set(dataset.labels):
            fitting.append(contender)
        else:
            reason = (
                f"labels: expected those of {dataset.name} ({', '.join(dataset.labels)}), "
                f"found {', '.join(labels)}; give a model that was trained on these classes"
            )
            strangers.append(Absent(contender.backend, contender.model, reason))
    return fitting, strangers


def predict(
    contenders: Sequence[Contender], dataset: Dataset, samples: Sequence[Sample]
) -> tuple[dict[Contender, Float32Array], list[Absent]]:
    """Probabilities of every model for every image.

    Args:
        contenders: Models with the data set's labels.
        dataset: Gives the order of the classes.
        samples: N images.

    Returns:
        Per model float32 (N, C), columns in the data set's order; and the models that failed.
    """
    parts: dict[Contender, list[Float32Array]] = {entry: [] for entry in contenders}
    columns = {
        entry: [entry.predictor.spec.labels.index(label) for label in dataset.labels]
        for entry in contenders
    }
    failed: list[Absent] = []
    for inputs in model_inputs(samples, contenders):
        for entry in list(parts):
            try:
                _, probabilities = entry.predictor.infer(inputs[_geometry(entry)])
            except CANNOT_RUN as error:
                failed.append(Absent(entry.backend, entry.model, one_line(error)))
                del parts[entry]
            else:
                parts[entry].append(probabilities[:, columns[entry]])
    return {entry: np.concatenate(chunks) for entry, chunks in parts.items()}, failed


def model_inputs(
    samples: Sequence[Sample], contenders: Sequence[Contender]
) -> Iterator[dict[tuple[int, str], UInt8Array]]:
    """Decode each image once, and resize it once for each size and filter that a model wants.

    Yields:
        Input size S and filter -> uint8 (N, S, S, 3), for a few images at a time.
    """
    specs = {_geometry(entry): entry.predictor.spec for entry in contenders}
    for start in range(0, len(samples), _CHUNK):
        images = [load_image(sample.path) for sample in samples[start : start + _CHUNK]]
        yield {
            geometry: np.stack([resize(image, spec) for image in images])
            for geometry, spec in specs.items()
        }


def choose_reference(contenders: Sequence[Contender]) -> Contender:
    """The first PyTorch model, else the first in FP32, else the first."""
    torch = [entry for entry in contenders if entry.backend.startswith("torch")]
    fp32 = [entry for entry in contenders if entry.precision == "fp32"]
    return [*torch, *fp32, *contenders][0]


def describe_model(contender: Contender) -> dict[str, Any]:
    """The model's part of a row."""
    described = contender.describe()
    return {"model": described.pop("name"), "backend": contender.backend, **described}


def score(
    probabilities: Float32Array, labels: IndexArray, reference: Float32Array
) -> dict[str, Any]:
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


def warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
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


def _geometry(contender: Contender) -> tuple[int, str]:
    spec = contender.predictor.spec
    return spec.input_size, spec.resize


if __name__ == "__main__":
    run_command(main)
