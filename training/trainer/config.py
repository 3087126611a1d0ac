"""The options of a training, the job that they describe, and how far it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficientface_deploy.artifact import read_safetensors_metadata, spec_from_metadata
from efficientface_deploy.command import option
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.models import load_backbone
from efficientface_deploy.predictor import ACCURATE, ACCURATE_WEIGHTS, BUNDLED_WEIGHTS
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.dataset import Dataset
from training.trainer.augmentation import AUGMENTATIONS
from training.trainer.pictures import ON_DEVICE
from training.trainer.recipe import SCHEDULES, SELECTIONS, Recipe

CONFIG = "config.json"
# As --init; a file of such a name wants its whole path.
OURS = {Path("bundled"): BUNDLED_WEIGHTS, Path(ACCURATE): ACCURATE_WEIGHTS}
LARGEST_SEED = 2**32 - 1  # leaves room for the seeds of views, which are made of it
AMP: dict[str, torch.dtype | None] = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# What may change when a run goes on: it changes no result, rounding on another device aside. Where
# the images lie is as free as where the run does: they are known by their content.
FREE_OPTIONS = (
    *("data", "out", "workers", "device", "data_on_device", "resume"),
    *("save_minutes", "tensorboard", "compile", "store"),
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options that teacher and student share; None stands for the recipe's value."""

    data: Path = option(help="a prepared data set", first=True)
    out: Path = option(help="folder of the run", first=True)
    init: Path | None = option(
        None,
        help="start from a checkpoint, or from bundled or accurate, ours; a foreign head is left",
    )
    preset: str | None = option(None, help="what numbered folders mean, without dataset.json")
    input_size: int | None = option(
        None,
        help="side of the input; default: the preset's, or the bundled model's with its weights",
    )
    epochs: int | None = option(None, minimum=1, help="passes; default: the recipe's")
    batch_size: int | None = option(
        None, minimum=2, help="images of a step, over all processes; default: the recipe's"
    )
    learning_rate: float | None = option(None, minimum=0, help="largest; default: the recipe's")
    schedule: str | None = option(
        None, choices=SCHEDULES, help="of the learning rate; default: the recipe's"
    )
    step_epochs: int | None = option(
        None, minimum=1, help="epochs between two steps of --schedule step; default: the recipe's"
    )
    weight_decay: float | None = option(None, minimum=0, help="default: the recipe's")
    augmentation: str | None = option(
        None, choices=tuple(AUGMENTATIONS), help="random changes; default: the recipe's"
    )
    ema: float | None = option(
        None, minimum=0, maximum=0.99999, help="decay of the weights' moving average, 0 for none"
    )
    select: str | None = option(
        None, choices=SELECTIONS, help="what chooses the epoch to keep; default: the recipe's"
    )
    seed: int = option(
        0, minimum=0, maximum=LARGEST_SEED, help="of weights, order and augmentation"
    )
    workers: int = option(
        1, minimum=0, help="processes that read images which are not kept on the device, per rank"
    )
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    data_on_device: str = option(
        "auto",
        choices=ON_DEVICE,
        help="keep all pictures in the device's memory; auto: if they fit",
    )
    amp: str = option("off", choices=tuple(AMP), help="mixed precision")
    channels_last: bool = option(True, help="memory format of images and weights")
    compile: bool = option(False, help="torch.compile the network")
    sync_batch_norm: bool = option(False, help="batch norm over all GPUs of a torchrun")
    save_minutes: float = option(5.0, minimum=0, help="time between two saved states")
    tensorboard: bool = option(True, help="write OUT/tensorboard")
    resume: bool = option(False, help="go on with the run in --out")

    def change(self, recipe: Recipe) -> Recipe:
        """The recipe with what the command line says otherwise.

        Raises:
            ConfigError: Steps are given to a schedule that has none.
        """
        own = {field.name for field in dataclasses.fields(self)}
        shared = [field.name for field in dataclasses.fields(Recipe) if field.name in own]
        given = {name: value for name in shared if (value := getattr(self, name)) is not None}
        changed = dataclasses.replace(recipe, **given)
        if self.step_epochs is not None and changed.schedule != "step":
            wanted = f"none with the schedule {changed.schedule}"
            fix = "leave it out, or add --schedule step"
            raise ConfigError("--step-epochs", wanted, str(self.step_epochs), fix)
        return changed

    def check_device(self, device: torch.device) -> None:
        """Refuse options that this device does not have.

        Raises:
            ConfigError: fp16 or SyncBatchNorm on a CPU.
        """
        check_amp("--amp", self.amp, device)
        name = "--sync-batch-norm"
        if self.sync_batch_norm and device.type == "cpu":
            raise ConfigError(name, "CUDA devices", "a CPU", f"leave {name} out")

    def model_spec(self, dataset: Dataset, architecture: str) -> ModelSpec:
        """The spec of the network that is trained on this data set.

        What starts from the bundled weights goes on seeing what they have seen, grey pictures of
        their size and normalisation: few new pictures are not to unlearn that first.
        """
        spec = dataset.spec
        if own := self.init and OURS.get(self.init):
            seen = spec_from_metadata(read_safetensors_metadata(own), own)
            kept = ("input_size", "colour", "mean", "std")
            spec = spec.replace(**{name: getattr(seen, name) for name in kept})
        size = spec.input_size if self.input_size is None else self.input_size
        return spec.resized(size, architecture)

    def load_init(self, model: nn.Module, spec: ModelSpec) -> None:
        """Put the weights of ``--init`` into a network, where it is given.

        Raises:
            CheckpointError: The file cannot be used.
        """
        if self.init is not None:
            load_backbone(model, spec, OURS.get(self.init, self.init))


def check_amp(name: str, amp: str, device: torch.device) -> None:
    """Refuse a precision in which this device would not compute, or only pretend to.

    Args:
        name: The option.
        amp: Its value, of :data:`AMP`.
        device: Where the training computes.

    Raises:
        ConfigError: fp16 on a CPU, or bf16 on a GPU that has none.
    """
    if amp == "fp16" and device.type == "cpu":
        raise ConfigError(f"{name} fp16", "a CUDA device", "a CPU", f"leave {name} out")
    if (
        amp == "bf16"
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        card = torch.cuda.get_device_name(device)
        fix = f"give {name} fp16, or leave it out"
        raise ConfigError(f"{name} bf16", "a GPU of compute capability 8.0 or newer", card, fix)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on what, and how.

    Attributes:
        kind: File stem of the result: ``student`` or ``teacher``.
        spec: The network's spec.
        recipe: How it is trained.
        dataset: The prepared data set.
        config: The command's options.
        inputs: Hashes of what is read beside the options, by name.
    """

    kind: str
    spec: ModelSpec
    recipe: Recipe
    dataset: Dataset
    config: TrainConfig
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def result(self) -> Path:
        """The checkpoint of the chosen epoch."""
        return self.config.out / f"{self.kind}.safetensors"

    @property
    def state(self) -> Path:
        """What ``--resume`` goes on from."""
        return self.config.out / "last.pt"

    def settings(self) -> dict[str, Any]:
        """The command's options, with the values that stood for those left out."""
        return {
            **dataclasses.asdict(self.config),
            **dataclasses.asdict(self.recipe),
            "preset": self.dataset.preset,
            "input_size": self.spec.input_size,
        }

    def identity(self) -> dict[str, str]:
        """What must stay the same for a run to go on, by name."""
        settings = self.settings()
        fixed = {name: str(value) for name, value in settings.items() if name not in FREE_OPTIONS}
        return {**fixed, "spec": self.spec.to_json(), **self.inputs}


@dataclasses.dataclass
class TrainerState:
    """How far a run is; what a saved state holds beside the weights.

    Attributes:
        step: Steps done in the epoch ``len(history)``.
        total_loss: The sum of their losses, each the mean over all processes.
        seconds: How long they took.
        history: One row of figures for each whole epoch.
    """

    step: int = 0
    total_loss: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def epoch(self) -> int:
        """The epoch that is being done, from 0."""
        return len(self.history)
