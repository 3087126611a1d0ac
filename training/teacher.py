"""Train a label distribution generator: a ResNet by cross-entropy on labels or votes.

``python -m training.teacher --data data/ferplus --arch resnet18 --out runs/ldg``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.models import LabelDistributionGenerator, load_backbone
from efficientface_deploy.workbench.dataset import read_dataset
from training.trainer.augmentation import AUGMENTATIONS
from training.trainer.checkpointing import claim_folder
from training.trainer.config import Job, TrainConfig
from training.trainer.distributed import join_ranks
from training.trainer.loader import TrainingImages, choose_samples
from training.trainer.loop import check_device, start_logging, train
from training.trainer.recipe import DEFAULT_TEACHER
from training.trainer.targets import own_targets


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
    recipe = config.change(DEFAULT_TEACHER)
    job = Job("teacher", spec, recipe, dataset, config)
    with join_ranks(config.device) as ranks:
        check_device(config, ranks.device)
        with claim_folder(job, ranks):
            samples, selection = choose_samples(job, ranks)
            augmentation = AUGMENTATIONS[recipe.augmentation](spec)
            images = TrainingImages(samples, spec, augmentation, config.seed, votes=config.votes)

            torch.manual_seed(config.seed)
            model = LabelDistributionGenerator(spec.num_classes, config.arch)
            if config.init is not None:
                load_backbone(model, spec, config.init)
            train(job, model, images, selection, own_targets, ranks)
            if ranks.is_first:
                print(f"teacher: {job.result}")
    return 0


if __name__ == "__main__":
    run_command(main)
