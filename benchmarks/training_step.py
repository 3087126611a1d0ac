"""What a training step costs: alone, with stored label distributions, beside its teacher; an LDG's.

``python benchmarks/training_step.py --data data/ferplus --teacher runs/ldg/teacher.safetensors``.
A step is all that an epoch consists of: loading, augmenting, forward, backward, optimiser, moving
average. All take turns in rounds of random order; see
:mod:`efficientface_deploy.workbench.timing`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.training_step", "train,bench")

import torch
from torch import nn

from benchmarks.report.publish import run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.command import option
from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.workbench.dataset import read_dataset
from efficientface_deploy.workbench.timing import Call, Samples, measure, speedup
from training.trainer.config import Job, TrainConfig, TrainerState
from training.trainer.distributed import Distributed
from training.trainer.label_store import stored_distributions
from training.trainer.loader import Batch, TrainingImages, choose_samples
from training.trainer.loop import Trainer
from training.trainer.recipe import DEFAULT_STUDENT
from training.trainer.small_maps import SmallMapConv2d, has_amx
from training.trainer.targets import Blend, TargetFunction, Teacher, loaded_targets

BASELINE = "no teacher"


@dataclasses.dataclass(frozen=True)
class TrainingBenchConfig:
    """Options of ``python benchmarks/training_step.py``."""

    data: Path = option(help="a prepared data set", first=True)
    teacher: Path = option(help="the LDG's checkpoint", first=True)
    input_size: int = option(96, help="side of the student's input")
    batch_size: int = option(64, minimum=2, help="images of a step")
    images: int = option(640, minimum=64, help="training images that are used")
    seconds: float = option(20.0, metavar="S", minimum=0.001, help="timed steps for each row")
    rounds: int = option(10, metavar="N", minimum=3, help="turns of each row")
    seed: int = option(0, minimum=0, help="of images and order")
    out: Path | None = option(
        None,
        metavar="DIR",
        help="folder of the result (default: a new one in benchmarks/results)",
        first=True,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: what is trained, where the targets come from, and how the step is computed."""

    name: str
    network: str = "student"
    targets: str = "own"
    amp: str = "off"
    threads: int = 1
    workers: int = 0
    channels_last: bool = True
    matrix_products: bool = True


def plan_cases() -> list[Case]:
    """The three sources of targets, and the settings of a CPU that one may choose."""
    cores, ldg = usable_cpus(), "the LDG's own training"
    several = [
        Case(f"{cores} threads", threads=cores),
        Case(f"{cores} threads, one loading worker", threads=cores, workers=1),
    ]
    no_products = Case(f"{ldg}, bf16, no matrix products", "ldg", amp="bf16", matrix_products=False)
    return [
        Case(BASELINE),
        Case("stored distributions", targets="stored"),
        Case("teacher in every step", targets="online"),
        Case("contiguous memory", channels_last=False),
        Case("one loading worker", workers=1),
        Case("bf16", amp="bf16"),
        *(several if cores > 1 else []),
        Case(ldg, "ldg"),
        Case(f"{ldg}, bf16", "ldg", amp="bf16"),
        *([no_products] if has_amx() else []),  # elsewhere there are none
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/training_step.py``."""
    example = "--data data/ferplus --teacher runs/ldg/teacher.safetensors"
    return run_benchmark(
        "training_step", TrainingBenchConfig, run, argv, __doc__, example, "training"
    )


def run(config: TrainingBenchConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object."""
    cases = plan_cases()
    with tempfile.TemporaryDirectory() as folder:
        calls = {case.name: step_of(case, config, Path(folder)) for case in cases}
        threads = {case.name: case.threads for case in cases}
        samples = measure(
            calls,
            seconds=config.seconds,
            rounds=config.rounds,
            seed=config.seed,
            before_turn=lambda name: torch.set_num_threads(threads[name]),
            machine_clock=lambda: None,  # to it, the workers that load images are others
        )
    return {
        **new_result("training", config),
        "baseline": BASELINE,
        "cases": [describe(case, samples, config.batch_size) for case in cases],
    }


def step_of(case: Case, config: TrainingBenchConfig, folder: Path) -> Call:
    """A function that does the next step of a training."""
    dataset = read_dataset(config.data)
    torch.manual_seed(config.seed)
    if case.network == "ldg":
        model, own = load_checkpoint(config.teacher)
    else:
        own = dataset.spec.replace(architecture="efficientface", input_size=config.input_size)
        model = EfficientFace(own.num_classes)
    options = TrainConfig(
        config.data,
        folder,
        input_size=own.input_size,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=case.workers,
        channels_last=case.channels_last,
        amp=case.amp,
    )
    spec = options.model_spec(dataset, own.architecture)
    recipe = dataclasses.replace(options.change(DEFAULT_STUDENT), epochs=1_000, views=1)
    job = Job("teacher" if case.network == "ldg" else "student", spec, recipe, dataset, options)
    dist = Distributed(torch.device("cpu"))
    samples = choose_samples(job, dist)[0][:: len(dataset.split("train")) // config.images + 1]
    images = TrainingImages(samples, spec, recipe.augmentation, config.seed)
    targets = target_function(case, config, images, job, folder)
    trainer = Trainer(job, model, images, targets, dist)
    if not case.matrix_products:
        use_library_convolutions(model)
    trainer.step.forward.train()
    batches = endless(trainer)

    def step() -> None:
        trainer.train_step(next(batches), TrainerState())

    return step


def target_function(
    case: Case, config: TrainingBenchConfig, images: TrainingImages, job: Job, folder: Path
) -> TargetFunction:
    """The source of a step's targets; stored distributions are computed now."""
    if case.targets == "own":
        return loaded_targets
    dist = Distributed(torch.device("cpu"))
    teacher, blend = Teacher(config.teacher, None, job.spec, dist.device), Blend()
    if case.targets == "online":
        return lambda batch, own: blend(teacher(batch), own)
    data_hash = images.content_hash(job.dataset.root)
    path = folder / "store.safetensors"
    images.targets = stored_distributions(path, images, teacher, 1, data_hash, dist, 0)
    return loaded_targets


def use_library_convolutions(model: nn.Module) -> None:
    """Undo :func:`training.trainer.small_maps.use_matrix_products`, in place."""
    for module in model.modules():
        if type(module) is SmallMapConv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # of the same parameters


def endless(trainer: Trainer) -> Iterator[Batch]:
    """The batches of one epoch after another."""
    while True:
        yield from trainer.loader
        trainer.order.epoch += 1


def describe(case: Case, samples: dict[str, Samples], batch_size: int) -> dict[str, Any]:
    """One row of the result."""
    own = samples[case.name]
    return {
        **dataclasses.asdict(case),
        **own.figures(),
        "images_per_second": 1000 * batch_size / own.p50_ms,
        "cost": speedup(own, samples[BASELINE]),  # above 1: costs more than the baseline
    }
