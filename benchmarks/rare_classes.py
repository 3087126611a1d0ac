"""What finding the rare classes costs, by cross-validation on the training split.

``python benchmarks/rare_classes.py --data data/ferplus``. The training split is cut into folds by
the seed; for each fold a network is trained on the others, from scratch, and asked about it. So
every picture is judged by a network that has not seen it, and a class of 200 pictures has 200 to be
judged by, where a validation split has 20. Then the training set's class frequencies are taken out
of what the networks say, by a strength from 0 (as it is) to 1 (``--prior uniform``): logit
adjustment (Menon et al. 2021). Half way is the prior whose weights are the roots of the
frequencies.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.rare_classes", "train,cpu,bench")

import numpy as np
import torch

from benchmarks.measure.trainings import train
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.command import option
from efficientface_deploy.errors import DatasetError
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.prior import adjust
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.dataset import Sample, read_dataset
from efficientface_deploy.workbench.evaluation import Scores, labels_of, predict
from efficientface_deploy.workbench.metrics import share_interval
from training.trainer.inference import infer_with

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RARE = 0.05  # a class with a smaller share of the pictures has a column of its own


@dataclasses.dataclass(frozen=True)
class RareClassesConfig:
    """Options of ``python benchmarks/rare_classes.py``."""

    data: Path = option(help="a prepared data set", first=True)
    targets: str = option("votes", help="of the trainings", choices=("votes", "onehot"))
    folds: int = option(3, minimum=2, maximum=20, help="networks that are trained")
    input_size: int = option(64, minimum=32, help="side of the input")
    epochs: int = option(12, minimum=1, help="of each training")
    work: Path | None = option(None, metavar="DIR", help="keep the trainings there, and go on")
    seed: int = option(0, minimum=0, help="of the folds, the weights and the order")
    out: Path | None = out_option()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/rare_classes.py``."""
    example = "--data data/ferplus --work runs/rare-classes"
    return run_benchmark("rare_classes", RareClassesConfig, run, argv, __doc__, example, "rare")


def run(config: RareClassesConfig) -> dict[str, Any]:
    """Train, judge, and give the result as a JSON object."""
    dataset = read_dataset(config.data)
    parts = folds(dataset.split("train"), config.folds, config.seed)
    result = new_result("rare", config)
    options = [f"--targets={config.targets}", f"--input-size={config.input_size}"]
    options += [f"--epochs={config.epochs}", "--augmentation=mild", f"--seed={config.seed}"]
    logits, frequencies = [], []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) if config.work is None else config.work
        for number, part in enumerate(parts):
            others = [sample for own in parts if own is not part for sample in own]
            path = train(work / f"fold-{number}", dataset, others, *options)
            model, spec = load_checkpoint(path)
            if spec.class_frequencies is None:
                fix = "give fewer --folds"
                raise DatasetError(config.data, "every class in every fold", "one without", fix)
            infer = infer_with(model, spec, torch.device("cpu"))
            logits.append(predict(infer, part, spec))  # (N of the fold, C)
            frequencies.append(np.tile(spec.class_frequencies, (len(part), 1)))
    labels = labels_of([sample for part in parts for sample in part])  # (N,)
    said, share = np.concatenate(logits), np.concatenate(frequencies).astype(np.float32)  # (N, C)
    rows = [row(labels, said, share, strength, dataset.labels) for strength in STRENGTHS]
    described = {"name": dataset.name, "split": "train", "images": len(labels)}
    return {**result, "data": described, "rows": rows}


def folds(samples: Sequence[Sample], count: int, seed: int) -> list[list[Sample]]:
    """Parts of a data set, each with its share of every class as far as that can be."""
    order = np.random.default_rng(seed).permutation(len(samples))
    by_class = sorted((samples[index] for index in order), key=lambda sample: sample.label)
    return [by_class[first::count] for first in range(count)]


def row(
    labels: np.ndarray,
    logits: Float32Array,
    frequencies: Float32Array,
    strength: float,
    names: Sequence[str],
) -> dict[str, Any]:
    """The figures at one strength, for labels (N,) and logits (N, C)."""
    _, probabilities = adjust(logits, np.float32(-strength) * np.log(frequencies))
    scores = Scores.of(labels, probabilities)
    counts = scores.confusion.sum(axis=1)  # (C,)
    figures: dict[str, Any] = {"strength": strength, **scores.summary}
    for index, name in enumerate(names):
        if counts[index] < RARE * len(labels):
            found, images = int(scores.confusion[index, index]), int(counts[index])
            key = f"{name}, {images:,} images"
            figures[key] = found / images
            figures[f"{key}_interval"] = share_interval(found, images)
    return figures


if __name__ == "__main__":
    sys.exit(main())
