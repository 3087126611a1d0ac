"""What few pictures of one's own give: from scratch, and from a network that has seen others.

``python benchmarks/fine_tuning.py --data data/ferplus``. The training split is cut in two by the
seed. One half trains the network to start from, as the bundled one would be; the other half gives
the pictures of one's own, fewer and fewer, whose classes have other names, as one's own would.
From each of these sets a network is trained from scratch, another from that network, as
``training.student --init`` does it, and a third keeps all of it but a new last layer
(``--freeze yes``). All are scored on the validation split, which chooses nothing.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.fine_tuning", "train,cpu,bench")

import numpy as np
import torch
from torch import nn

from benchmarks.measure.trainings import train
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.command import option
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.dataset import Dataset, Sample, read_dataset
from efficientface_deploy.workbench.evaluation import (
    Scores,
    labels_of,
    predict,
    softmax,
)
from training.trainer.inference import infer_with
from training.trainer.recipe import DEFAULT_STUDENT, FINE_TUNED_STUDENT

_MILD = ("--augmentation", "mild")


@dataclasses.dataclass(frozen=True)
class FineTuningConfig:
    """Options of ``python benchmarks/fine_tuning.py``."""

    data: Path = option(help="a prepared data set", first=True)
    own: tuple[int, ...] = option((2500, 500, 250), metavar="N", help="pictures of one's own")
    input_size: int = option(64, minimum=32, help="side of the input")
    base_epochs: int = option(16, minimum=1, help="of the network to start from")
    steps: int = option(600, minimum=1, help="of each training on pictures of one's own")
    work: Path | None = option(None, metavar="DIR", help="keep the trainings there, and go on")
    seed: int = option(0, minimum=0, help="of the halves, the weights and the order")
    out: Path | None = out_option()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/fine_tuning.py``."""
    example = "--data data/ferplus --work runs/fine-tuning"
    return run_benchmark("fine_tuning", FineTuningConfig, run, argv, __doc__, example, "finetuning")


def run(config: FineTuningConfig) -> dict[str, Any]:
    """Train and score, and give the result as a JSON object."""
    dataset = read_dataset(config.data)
    first, second = halves(dataset, config.seed)
    smallest = max(len(dataset.labels), DEFAULT_STUDENT.batch_size)
    for count in config.own:
        if not smallest <= count <= len(second):
            expected = f"{smallest} to {len(second):,}, half of the training split"
            raise ConfigError("--own", expected, str(count), "give other numbers")
    result = new_result("finetuning", config)
    samples = dataset.split(dataset.evaluation_split())
    common = ("--targets=onehot", f"--input-size={config.input_size}", f"--seed={config.seed}")

    def row(way: str, count: int, model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
        infer = infer_with(model, spec, torch.device("cpu"))
        scores = Scores.of(labels_of(samples), softmax(predict(infer, samples, spec)))
        return {"way": way, "images": count, **scores.summary}

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) if config.work is None else config.work
        # Strong augmentation would leave a short training far from its end.
        base_options = (*common, f"--epochs={config.base_epochs}", *_MILD)
        base = train(work / "base", dataset, first, *base_options)
        rows = [row("to start from", len(first), *load_checkpoint(base))]
        for count in config.own:
            own = second[:count]
            epochs = math.ceil(config.steps / (count // DEFAULT_STUDENT.batch_size))
            tuned = ["--init", str(base), "--learning-rate", str(FINE_TUNED_STUDENT.learning_rate)]
            ways = {
                "from scratch": [],
                "all layers": [*tuned, "--freeze", "no"],
                "a new last layer": [*tuned, "--freeze", "yes"],
            }
            for way, options in ways.items():
                folder = work / f"{way.replace(' ', '-')}-{count}"
                path = train(folder, dataset, own, *common, f"--epochs={epochs}", *options)
                rows.append(row(way, count, *load_checkpoint(path)))
    described = {"name": dataset.name, "split": dataset.evaluation_split()}
    return {**result, "data": described, "cases": rows}


def halves(dataset: Dataset, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Two halves of the training split.

    The second begins with one picture of each class, so that its first N have all of them; the rest
    is in random order.
    """
    samples = list(dataset.split("train"))
    order = np.random.default_rng(seed).permutation(len(samples))
    shuffled = [samples[index] for index in order]
    middle = len(shuffled) // 2
    second = shuffled[middle:]
    first_of = {sample.label: sample for sample in reversed(second)}
    chosen = {id(sample) for sample in first_of.values()}
    return shuffled[:middle], [
        *first_of.values(),
        *(sample for sample in second if id(sample) not in chosen),
    ]


if __name__ == "__main__":
    sys.exit(main())
