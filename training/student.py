"""Train EfficientFace from the label distributions of an LDG, from votes, or from labels.

``python -m training.student --data data/ferplus --teacher runs/ldg/teacher.safetensors --out
runs/student``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import file_hash
from efficientface_deploy.models import EfficientFace, load_backbone
from efficientface_deploy.workbench.dataset import Sample, read_dataset
from training.trainer.augmentation import AUGMENTATIONS
from training.trainer.checkpointing import claim_folder
from training.trainer.config import AMP, Job, TrainConfig
from training.trainer.distributed import Ranks, join_ranks
from training.trainer.label_store import (
    STORE,
    check_store_options,
    store_binding,
    stored_distributions,
)
from training.trainer.loader import TrainingImages, choose_samples
from training.trainer.loop import check_amp, check_device, start_logging, train
from training.trainer.recipe import DEFAULT_STUDENT, published_student
from training.trainer.targets import TARGETS, Blend, Teach, Teacher, own_targets

# Options that have an effect only where an LDG is asked.
_FOR_LDG = ("teacher", "teacher_amp", "temperature", "views")


@dataclasses.dataclass(frozen=True)
class StudentConfig(TrainConfig):
    """Options of ``training.student``."""

    targets: str = option("ldg", choices=TARGETS, help="what the student learns from")
    teacher: Path | None = option(None, help="the LDG's checkpoint, for --targets ldg...")
    recipe: str = option("default", choices=("default", "published"), help="how it is trained")
    views: int | None = option(
        None,
        minimum=0,
        help="views of each image for which the LDG is asked once; 0 asks it in every step",
    )
    store: Path | None = option(
        None, help=f"file of the LDG's answers, for several runs; default: OUT/{STORE}"
    )
    teacher_amp: str | None = option(
        None, choices=tuple(AMP), help="mixed precision of the LDG; default: as --amp"
    )
    ldg_share: float | None = option(
        None, minimum=0, maximum=1, help="weight of the LDG in ldg+onehot and ldg+votes, 0 to 1"
    )
    temperature: float | None = option(None, minimum=0.01, help="softens the LDG; 1 as published")
    preliminary: bool = option(False, help="mark the weights as to be replaced by better ones")

    @property
    def teacher_amp_type(self) -> torch.dtype | None:
        """The lower precision in which the LDG computes; None for float32."""
        return AMP[self.amp if self.teacher_amp is None else self.teacher_amp]

    @property
    def asks_teacher(self) -> bool:
        """Whether an LDG takes part."""
        return self.targets.startswith("ldg")

    @property
    def votes(self) -> bool:
        """Whether the data set's own targets are its votes."""
        return self.targets.endswith("votes")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.student``."""
    config = parse_config(
        StudentConfig, argv, prog="python -m training.student", description=__doc__ or ""
    )
    start_logging()
    dataset = read_dataset(config.data, config.preset)
    spec = config.model_spec(dataset, "efficientface").replace(preliminary=config.preliminary)
    published = config.recipe == "published"
    recipe = config.change(published_student(dataset.preset) if published else DEFAULT_STUDENT)
    check_targets(config, recipe.views)
    if not config.asks_teacher:
        recipe = dataclasses.replace(recipe, views=0)
    inputs = {}
    if config.teacher is not None and config.teacher.is_file():
        inputs["teacher"] = file_hash(config.teacher)
    job = Job("student", spec, recipe, dataset, config, inputs)
    with join_ranks(config.device) as ranks:
        check_device(config, ranks.device)
        if config.teacher_amp is not None:
            check_amp("--teacher-amp", config.teacher_amp, ranks.device)
        with claim_folder(job, ranks):
            samples, selection = choose_samples(job, ranks)
            torch.manual_seed(config.seed)
            model = EfficientFace(spec.num_classes)
            if config.init is not None:
                load_backbone(model, spec, config.init)
            images, teach = choose_targets(job, config, samples, ranks)
            train(job, model, images, selection, teach, ranks)
            if ranks.is_first:
                print(f"student: {job.result}")
    return 0


def check_targets(config: StudentConfig, views: int) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: ``ldg`` without a teacher; a teacher, its precision, a share or a store that
            would not be used.
    """
    if config.asks_teacher and config.teacher is None:
        raise ConfigError(
            "--teacher",
            f"an LDG's checkpoint for --targets {config.targets}",
            "none",
            "train one with python -m training.teacher, or choose --targets onehot or votes",
        )
    if not config.asks_teacher:
        _refuse(config, _FOR_LDG, "which asks no LDG")
    if "+" not in config.targets:
        _refuse(config, ("ldg_share",), "which blends nothing")
    check_store_options(config.store, views, config.asks_teacher)


def _refuse(config: StudentConfig, names: Sequence[str], reason: str) -> None:
    """Refuse options that would have no effect."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            shown = "--" + name.replace("_", "-")
            raise ConfigError(
                shown,
                f"none with --targets {config.targets}, {reason}",
                str(value),
                f"leave {shown} out, or choose other --targets",
            )


def choose_targets(
    job: Job, config: StudentConfig, samples: list[Sample], ranks: Ranks
) -> tuple[TrainingImages, Teach]:
    """The images with their own or stored targets, and what else a step asks.

    Args:
        job: The run.
        config: The command's options, checked.
        samples: N images to train on.
        ranks: The processes that train together.
    """
    recipe, spec = job.recipe, job.spec
    augmentation = AUGMENTATIONS[recipe.augmentation](spec)
    images = TrainingImages(samples, spec, augmentation, config.seed, votes=config.votes)
    if config.teacher is None:
        return images, own_targets
    teacher = Teacher(config.teacher, config.preset, spec, ranks.device, config.teacher_amp_type)
    blend = Blend(recipe.temperature, 1.0 if config.targets == "ldg" else recipe.ldg_share)
    if recipe.views == 0:
        return images, lambda batch, own: blend(teacher(batch), own)

    data_hash = images.content_hash(job.dataset.root)
    binding = store_binding(images, teacher, recipe.augmentation, data_hash)
    path = config.store or config.out / STORE
    views = min(recipe.views, recipe.epochs)
    stored = stored_distributions(
        path, images, teacher, views, binding, ranks, config.workers
    )  # (views, N, C)
    own = torch.from_numpy(images.targets)  # (1, N, C)
    images.targets = blend(torch.from_numpy(stored), own).numpy()
    return images, own_targets


if __name__ == "__main__":
    run_command(main)
