"""Train a label distribution generator: a ResNet by cross-entropy on the labels.

``python -m training.teacher --data data/ferplus --arch resnet18 --out runs/ldg``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.dataset import read_dataset
from efficientface_deploy.models import LabelDistributionGenerator, load_backbone
from training.loop import (
    Job,
    Recipe,
    TrainConfig,
    choose_device,
    labels_as_targets,
    start_logging,
    train,
)

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
class TeacherConfig(TrainConfig):
    """Options of ``training.teacher``."""

    arch: str = option("resnet50", choices=("resnet18", "resnet50"), help="the network")
    votes: bool = option(False, help="train from the votes instead of the labels")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.teacher``."""
    config = parse_config(
        TeacherConfig, argv, prog="python -m training.teacher", description=__doc__ or ""
    )
    start_logging()
    dataset = read_dataset(config.data, config.preset)
    spec = config.model_spec(dataset, config.arch)
    device = choose_device(config.device)

    torch.manual_seed(config.seed)
    model = LabelDistributionGenerator(spec.num_classes, config.arch)
    if config.init is not None:
        load_backbone(model, spec, config.init)
    job = Job("teacher", spec, config.change(RECIPE), dataset, config, votes=config.votes)
    result = train(job, model.to(device), labels_as_targets, device)
    print(f"teacher: {result}")
    return 0


if __name__ == "__main__":
    run_command(main)
