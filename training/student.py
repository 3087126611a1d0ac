"""Train EfficientFace from the label distributions of an LDG, from votes, or from labels."""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("training.student", "train,cpu")

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import file_hash
from efficientface_deploy.models import EfficientFace
from efficientface_deploy.workbench.dataset import Sample, read_dataset
from training.trainer import checkpointing, distributed
from training.trainer.config import AMP, OURS, Job, TrainConfig, check_amp
from training.trainer.distributed import Distributed
from training.trainer.label_store import STORE, stored_distributions
from training.trainer.loader import TrainingImages, choose_samples
from training.trainer.loop import train
from training.trainer.recipe import DEFAULT_STUDENT, FINE_TUNED_STUDENT, published_student
from training.trainer.targets import (
    TARGETS,
    Blend,
    Ensemble,
    TargetFunction,
    Teacher,
    loaded_targets,
)

# Pictures below which a new last layer alone is better; docs/training.md has the measurement.
FEW = 3000
# Options that have an effect only where an LDG is queried.
_FOR_LDG = ("teacher", "teacher_flips", "teacher_amp", "temperature", "views")


@dataclasses.dataclass(frozen=True)
class StudentConfig(TrainConfig):
    """Options of ``training.student``."""

    targets: str = option("ldg", choices=TARGETS, help="what the student learns from")
    teacher: tuple[Path, ...] = option(
        (), metavar="LDG", help="its checkpoint, or several whose mean teaches", first=True
    )
    teacher_flips: bool = option(False, help="query the LDG about the mirrored picture too")
    recipe: str = option("default", choices=("default", "published"), help="how it is trained")
    views: int | None = option(
        None,
        minimum=0,
        help="views of each image for which the LDG is queried once; 0 queries it in every step",
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
    freeze: str | None = option(
        None,
        choices=("yes", "no"),
        help="train the last layer alone, for few pictures; default: with --init bundled and fewer "
        f"than {FEW:,} of them",
    )
    preliminary: bool = option(False, help="mark the weights as to be replaced by better ones")

    @property
    def queries_teacher(self) -> bool:
        """Whether an LDG takes part."""
        return self.targets.startswith("ldg")

    def freezes(self, images: int) -> bool:
        """Whether the last layer alone is trained, on so many images.

        Raises:
            ConfigError: Random weights would be left as they are.
        """
        if self.freeze == "yes" and self.init is None:
            fix = "add --init bundled, or a checkpoint of yours"
            raise ConfigError("--freeze yes", "weights to start from", "no --init", fix)
        few = self.init in OURS and images < FEW
        return self.freeze == "yes" or (self.freeze is None and few)

    def check_device(self, device: torch.device) -> None:
        """As :meth:`TrainConfig.check_device`, for the LDG's precision too."""
        super().check_device(device)
        if self.teacher_amp is not None:
            check_amp("--teacher-amp", self.teacher_amp, device)

    def check_targets(self, views: int) -> None:
        """Refuse options that contradict each other, or would have no effect.

        Args:
            views: Of the recipe.

        Raises:
            ConfigError: ``ldg`` without a teacher; a teacher, its precision, a share or a store
                that would not be used.
        """
        if self.queries_teacher and not self.teacher:
            wanted = f"an LDG's checkpoint for --targets {self.targets}"
            fix = "train one with python -m training.teacher, or choose --targets onehot or votes"
            raise ConfigError("--teacher", wanted, "none", fix)
        useless = {} if self.queries_teacher else dict.fromkeys(_FOR_LDG, "which queries no LDG")
        if "+" not in self.targets:
            useless["ldg_share"] = "which blends nothing"
        for name, reason in useless.items():
            value = getattr(self, name)
            if value is None or value is False or value == ():
                continue
            shown = "--" + name.replace("_", "-")
            wanted = f"none with --targets {self.targets}, {reason}"
            fix = f"leave {shown} out, or choose other --targets"
            found = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            raise ConfigError(shown, wanted, found, fix)
        if self.store is None:
            return
        if not (self.queries_teacher and views):
            idle = "--views 0, which queries it in every step"
            found = idle if self.queries_teacher else "no teacher"
            wanted = "a teacher and --views of at least 1"
            raise ConfigError("--store", wanted, found, "leave --store out")
        if self.store.suffix != ".safetensors":
            wanted = "a name that ends in .safetensors"
            raise ConfigError("--store", wanted, self.store.name, "give it that ending")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.student``."""
    config = parse_config(
        StudentConfig,
        argv,
        prog="python -m training.student",
        description=__doc__ or "",
        example="--data data/ferplus --teacher runs/ldg/teacher.safetensors --out runs/student",
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # such as: the head starts anew
    dataset = read_dataset(config.data, config.preset)
    spec = config.model_spec(dataset, "efficientface").replace(preliminary=config.preliminary)
    published = config.recipe == "published"
    default = FINE_TUNED_STUDENT if config.init in OURS else DEFAULT_STUDENT
    recipe = config.change(published_student(dataset.preset) if published else default)
    config.check_targets(recipe.views)
    if not config.queries_teacher:
        recipe = dataclasses.replace(recipe, views=0)
    there = [path for path in config.teacher if path.is_file()]  # the rest is refused when opened
    inputs = {"teacher": " + ".join(map(file_hash, there))} if there else {}
    job = Job("student", spec, recipe, dataset, config, inputs)
    with distributed.init(config.device) as dist:
        config.check_device(dist.device)
        with checkpointing.lock(job, dist):
            samples, selection = choose_samples(job, dist)
            torch.manual_seed(config.seed)
            model = EfficientFace(spec.num_classes)
            config.load_init(model, spec)
            if config.freezes(len(samples)):
                freeze_all_but_head(model)
            images, target_function = choose_targets(job, config, samples, dist)
            train(job, model, images, selection, target_function, dist)
            if dist.is_main_process:
                print(f"student: {job.result}")
    return 0


def freeze_all_but_head(model: EfficientFace) -> None:
    """Leave weights and statistics of all layers but the last as they are, and say so."""
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    print("the last layer alone is trained (--freeze no trains all of them)", flush=True)


def choose_targets(
    job: Job, config: StudentConfig, samples: list[Sample], dist: Distributed
) -> tuple[TrainingImages, TargetFunction]:
    """The images with the data set's or stored targets, and what a step makes of these.

    Args:
        job: The run.
        config: The command's options, checked.
        samples: N images to train on.
        dist: The processes that train together.
    """
    recipe, spec = job.recipe, job.spec
    votes = config.targets.endswith("votes")
    images = TrainingImages(
        *(samples, spec, recipe.augmentation, config.seed),
        votes=votes,
        on_device=config.data_on_device,
    )
    if not config.teacher:
        return images, loaded_targets
    amp = AMP[config.amp if config.teacher_amp is None else config.teacher_amp]
    members = [Teacher(path, config.preset, spec, dist.device, amp) for path in config.teacher]
    teacher = Ensemble(members, flips=config.teacher_flips)
    blend = Blend(recipe.temperature, 1.0 if config.targets == "ldg" else recipe.ldg_share)
    if recipe.views == 0:
        return images, lambda batch, own: blend(teacher(batch), own)

    data_hash = images.content_hash(job.dataset.root)
    path = config.store or config.out / STORE
    views = min(recipe.views, recipe.epochs)
    stored = stored_distributions(path, images, teacher, views, data_hash, dist, config.workers)
    own = torch.from_numpy(images.targets)  # (1, N, C)
    images.targets = blend(torch.from_numpy(stored), own).numpy()  # (views, N, C)
    return images, loaded_targets
