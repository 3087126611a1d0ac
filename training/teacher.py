"""Train a label distribution generator: a ResNet by cross-entropy on labels or votes."""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("training.teacher", "train,cpu")

import dataclasses
import logging
from collections.abc import Sequence

import torch

from efficientface_deploy.command import option, parse_config
from efficientface_deploy.models import LabelDistributionGenerator
from efficientface_deploy.models.ldg import BACKBONES
from efficientface_deploy.workbench.dataset import read_dataset
from training.trainer import checkpointing, distributed
from training.trainer.config import Job, TrainConfig
from training.trainer.loader import TrainingImages, choose_samples
from training.trainer.loop import train
from training.trainer.recipe import DEFAULT_TEACHER
from training.trainer.targets import loaded_targets


@dataclasses.dataclass(frozen=True)
class TeacherConfig(TrainConfig):
    """Options of ``training.teacher``."""

    arch: str = option("resnet50", choices=BACKBONES, help="the network", first=True)
    votes: bool = option(False, help="train from the votes instead of the labels")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.teacher``."""
    config = parse_config(
        TeacherConfig,
        argv,
        prog="python -m training.teacher",
        description=__doc__ or "",
        example="--data data/ferplus --arch resnet18 --out runs/ldg",
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # such as: the head starts anew
    dataset = read_dataset(config.data, config.preset)
    spec = config.model_spec(dataset, config.arch)
    recipe = config.change(DEFAULT_TEACHER)
    job = Job("teacher", spec, recipe, dataset, config)
    with distributed.init(config.device) as dist:
        config.check_device(dist.device)
        with checkpointing.lock(job, dist):
            samples, selection = choose_samples(job, dist)
            images = TrainingImages(
                *(samples, spec, recipe.augmentation, config.seed),
                votes=config.votes,
                on_device=config.data_on_device,
            )
            torch.manual_seed(config.seed)
            model = LabelDistributionGenerator(spec.num_classes, config.arch)
            config.load_init(model, spec)
            train(job, model, images, selection, loaded_targets, dist)
            if dist.is_main_process:
                print(f"teacher: {job.result}")
    return 0
