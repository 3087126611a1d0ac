"""Train EfficientFace from the label distributions of an LDG, from votes, or from labels.

``python -m training.student --data data/ferplus --teacher runs/ldg/teacher.safetensors --out
runs/student``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transform

from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.dataset import read_dataset
from efficientface_deploy.errors import CheckpointError, ConfigError
from efficientface_deploy.models import EfficientFace, load_backbone, load_checkpoint
from efficientface_deploy.spec import ModelSpec
from training.loop import (
    Job,
    Recipe,
    Teach,
    TrainConfig,
    choose_device,
    labels_as_targets,
    start_logging,
    train,
)

TARGETS = ("ldg", "onehot", "votes")

# The public code's settings: epochs, epochs between steps, factor of a step.
PUBLISHED_SCHEDULES = {
    "rafdb": (100, 30, 0.1),
    "affectnet7": (20, 5, 0.1),
    "affectnet8": (20, 5, 0.1),
    "caers": (400, 50, 0.5),
}

# For networks that start from scratch; a prototype's, to be improved by measurement.
DEFAULT = Recipe(
    epochs=14,
    batch_size=64,
    learning_rate=0.15,
    weight_decay=5e-4,
    schedule="one-cycle",
    loss="cross-entropy",
    augmentation="default",
    nesterov=True,
)


@dataclasses.dataclass(frozen=True)
class StudentConfig(TrainConfig):
    """Options of ``training.student``."""

    targets: str = option("ldg", choices=TARGETS, help="what the student learns from")
    teacher: Path | None = option(None, help="the LDG's checkpoint, for --targets ldg")
    recipe: str = option("default", choices=("default", "published"), help="how it is trained")
    preliminary: bool = option(False, help="mark the weights as to be replaced by better ones")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.student``."""
    config = parse_config(
        StudentConfig, argv, prog="python -m training.student", description=__doc__ or ""
    )
    start_logging()
    dataset = read_dataset(config.data, config.preset)
    spec = config.model_spec(dataset, "efficientface").replace(preliminary=config.preliminary)
    device = choose_device(config.device)
    teach = choose_targets(config, spec, device)

    torch.manual_seed(config.seed)
    model = EfficientFace(spec.num_classes)
    if config.init is not None:
        load_backbone(model, spec, config.init)
    recipe = published_recipe(dataset.preset) if config.recipe == "published" else DEFAULT
    votes = config.targets == "votes"
    job = Job("student", spec, config.change(recipe), dataset, config, votes)
    result = train(job, model.to(device), teach, device)
    print(f"student: {result}")
    return 0


def published_recipe(preset: str) -> Recipe:
    """The public code's recipe for a data set; RAF-DB's for one that it does not know."""
    epochs, step_epochs, decay = PUBLISHED_SCHEDULES.get(preset, PUBLISHED_SCHEDULES["rafdb"])
    return Recipe(
        epochs=epochs,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=1e-4,
        schedule="step",
        loss="published",
        augmentation="published",
        step_epochs=step_epochs,
        decay=decay,
    )


def choose_targets(config: StudentConfig, spec: ModelSpec, device: torch.device) -> Teach:
    """What gives the target distributions.

    Raises:
        ConfigError: ``ldg`` without a teacher, or a teacher that would not be asked.
    """
    if config.targets == "ldg" and config.teacher is None:
        raise ConfigError(
            "--teacher",
            expected="an LDG's checkpoint for --targets ldg",
            found="none",
            fix="train one with python -m training.teacher, or choose --targets onehot or votes",
        )
    if config.targets != "ldg" and config.teacher is not None:
        raise ConfigError(
            "--teacher",
            expected=f"none with --targets {config.targets}",
            found=str(config.teacher),
            fix="leave --teacher out, or choose --targets ldg",
        )
    if config.teacher is None:
        return labels_as_targets
    return Teacher(config.teacher, config.preset, spec, device)


class Teacher:
    """A frozen LDG that sees the student's augmented images (section 3.3 of the paper).

    Args:
        path: The LDG's checkpoint.
        preset_name: What a published checkpoint was trained on.
        spec: The student's.
        device: Where to compute.

    Raises:
        CheckpointError: The checkpoint is a student, or has other classes or colours.
    """

    def __init__(
        self, path: Path, preset_name: str | None, spec: ModelSpec, device: torch.device
    ) -> None:
        model, own = load_checkpoint(path, preset_name)
        for what, theirs, ours in (
            ("labels", own.labels, spec.labels),
            ("colour", own.colour, spec.colour),
        ):
            if theirs != ours:
                raise CheckpointError(
                    path,
                    expected=f"{what} {ours}, as the data set has",
                    found=f"{theirs}",
                    fix="train a teacher on this data set with python -m training.teacher; for a "
                    "published checkpoint say with --preset what it was trained on",
                )
        if own.architecture == "efficientface":
            raise CheckpointError(
                path,
                expected="an LDG (resnet18 or resnet50)",
                found="an EfficientFace",
                fix="give the teacher's checkpoint",
            )
        self.model: nn.Module = model.to(memory_format=torch.channels_last).to(device)
        self.side = [own.input_size, own.input_size]
        # From the student's normalisation to the LDG's: x * scale + offset.
        student_mean, student_std = _channels(spec.mean, device), _channels(spec.std, device)
        own_mean, own_std = _channels(own.mean, device), _channels(own.std, device)
        self.scale = student_std / own_std  # (1, 3, 1, 1)
        self.offset = (student_mean - own_mean) / own_std
        self.same_normalisation = (spec.mean, spec.std) == (own.mean, own.std)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """The LDG's distributions (N, C) for images (N, 3, S, S); targets are not looked at."""
        if not self.same_normalisation:
            images = images * self.scale + self.offset
        if list(images.shape[-2:]) != self.side:
            images = transform.resize(images, self.side, antialias=True)
        distribution: Tensor = self.model(images).softmax(dim=1)
        return distribution


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


if __name__ == "__main__":
    run_command(main)
