"""Train a label distribution generator: a ResNet by cross-entropy on the labels.

``python -m training.teacher --data data/ferplus --arch resnet18 --out runs/ldg``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.dataset import read_dataset
from efficientface_deploy.models import LabelDistributionGenerator, load_backbone
from training.loop import SELECTIONS, Job, Recipe, choose_device, start_logging, train

# Cross-entropy with one cycle; measured starting point for networks trained from scratch.
RECIPE = Recipe(
    epochs=14,
    batch_size=64,
    learning_rate=0.05,
    weight_decay=5e-4,
    schedule="one-cycle",
    loss="cross-entropy",
    augmentation="default",
    nesterov=True,
)


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Options of ``training.teacher``."""

    data: Path = option(help="a prepared data set")
    out: Path = option(help="folder of the run")
    arch: str = option("resnet50", choices=("resnet18", "resnet50"), help="the network")
    init: Path | None = option(None, help="start from this checkpoint; a foreign head is left")
    preset: str | None = option(None, help="what numbered folders mean, without dataset.json")
    input_size: int | None = option(None, help="side of the input; default: the preset's")
    votes: bool = option(False, help="train from the votes instead of the labels")
    epochs: int = option(RECIPE.epochs, minimum=1, help="passes over the images")
    batch_size: int = option(RECIPE.batch_size, minimum=2, help="images of one step")
    learning_rate: float = option(RECIPE.learning_rate, minimum=0, help="largest learning rate")
    select: str = option("holdout", choices=SELECTIONS, help="what chooses the epoch to keep")
    seed: int = option(0, minimum=0, help="of weights, order and augmentation")
    workers: int = option(1, minimum=0, help="processes that load images")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    resume: bool = option(False, help="go on with the run in --out")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.teacher``."""
    config = parse_config(
        TeacherConfig, argv, prog="python -m training.teacher", description=__doc__ or ""
    )
    start_logging()
    dataset = read_dataset(config.data, config.preset)
    spec = dataset.spec.replace(architecture=config.arch)
    if config.input_size is not None:
        spec = spec.replace(input_size=config.input_size)

    torch.manual_seed(config.seed)
    model = LabelDistributionGenerator(spec.num_classes, config.arch)
    if config.init is not None:
        load_backbone(model, spec, config.init)
    device = choose_device(config.device)
    job = Job(
        kind="teacher",
        spec=spec,
        recipe=dataclasses.replace(
            RECIPE,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
        ),
        dataset=dataset,
        select=config.select,
        out=config.out,
        seed=config.seed,
        resume=config.resume,
        workers=config.workers,
        device=config.device,
        config=dataclasses.asdict(config),
        votes=config.votes,
    )
    result = train(job, model.to(device), labels_as_targets, device)
    print(f"teacher: {result}")
    return 0


def labels_as_targets(images: Tensor, targets: Tensor) -> Tensor:
    """The data set's own targets, (N, C), unchanged."""
    return targets


if __name__ == "__main__":
    run_command(main)
