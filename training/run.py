"""A training run: its options, what it is to do, and what its folder holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import efficientface_deploy
from efficientface_deploy.artifact import atomic_path, write_text
from efficientface_deploy.command import option
from efficientface_deploy.dataset import Dataset, Sample
from efficientface_deploy.errors import CheckpointError, ConfigError
from efficientface_deploy.lock import empty_folders_removed, lock_folder, make_folder
from efficientface_deploy.models import save_checkpoint
from efficientface_deploy.spec import ModelSpec
from training.data import AUGMENTATIONS
from training.parallel import Ranks
from training.recipe import SCHEDULES, SELECTIONS, Recipe

CONFIG = "config.json"
LARGEST_SEED = 2**32 - 1  # leaves room for the seeds of views, which are made of it
AMP: dict[str, torch.dtype | None] = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# What may change when a run goes on: it changes no result, rounding on another device aside.
FREE_OPTIONS = (
    "out",
    "workers",
    "device",
    "resume",
    "save_minutes",
    "tensorboard",
    "compile",
    "store",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options that teacher and student share."""

    data: Path = option(help="a prepared data set")
    out: Path = option(help="folder of the run")
    init: Path | None = option(None, help="start from this checkpoint; a foreign head is left")
    preset: str | None = option(None, help="what numbered folders mean, without dataset.json")
    input_size: int | None = option(None, help="side of the input; default: the preset's")
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
    workers: int = option(1, minimum=0, help="processes that load images, per rank")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")
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
        names = {field.name for field in dataclasses.fields(Recipe)}
        own = {field.name for field in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in sorted(names & own)}
        changed = dataclasses.replace(
            recipe, **{name: value for name, value in given.items() if value is not None}
        )
        if self.step_epochs is not None and changed.schedule != "step":
            raise ConfigError(
                "--step-epochs",
                expected=f"none with the schedule {changed.schedule}",
                found=str(self.step_epochs),
                fix="leave it out, or add --schedule step",
            )
        return changed

    @property
    def amp_type(self) -> torch.dtype | None:
        """The lower precision of mixed precision; None where it is off."""
        return AMP[self.amp]

    def model_spec(self, dataset: Dataset, architecture: str) -> ModelSpec:
        """The spec of the network that is trained on this data set."""
        size = dataset.spec.input_size if self.input_size is None else self.input_size
        return dataset.spec.replace(architecture=architecture).resized(size)


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
class Progress:
    """How far a run is; what a state holds beside the weights.

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


def check_classes(dataset: Dataset, samples: list[Sample]) -> None:
    """Refuse to train on images of which one class has none.

    Raises:
        ConfigError: Names the classes.
    """
    seen = {sample.label for sample in samples}
    if missing := [label for index, label in enumerate(dataset.labels) if index not in seen]:
        raise ConfigError(
            dataset.root,
            expected="training images of every class",
            found="none of " + ", ".join(missing),
            fix="add images, or prepare the data set with the classes that it has "
            "(python -m training.prepare folders --classes ...)",
        )


def check_folder(job: Job) -> None:
    """Refuse a folder that holds another run, or with ``--resume`` one that this cannot go on with.

    Raises:
        CheckpointError: There is no run to go on with, or its file is damaged.
        ConfigError: There is another run.
    """
    out = job.config.out
    if job.config.resume:
        _read_state(job, torch.device("cpu"))
    elif job.state.exists() or job.result.exists():
        raise ConfigError(
            out,
            expected="a new folder",
            found="another run",
            fix="choose another --out, or "
            + ("add --resume to go on with it" if job.state.exists() else "remove it"),
        )


@contextlib.contextmanager
def claim_folder(job: Job, ranks: Ranks) -> Iterator[None]:
    """Make the run's folder and keep other trainings out of it; one that stays empty goes again.

    Raises:
        CheckpointError: As :func:`check_folder`.
        ConfigError: The folder cannot be written, holds another run, or one is at work in it.
    """
    check_folder(job)
    if not ranks.is_first:
        yield
        return
    out = job.config.out
    with empty_folders_removed(out):
        make_folder(out)
        with lock_folder(out, "training"):
            yield


def start_run(job: Job) -> None:
    """Write down the run's options."""
    write_text(job.config.out / CONFIG, json.dumps(job.settings(), indent=2, default=str) + "\n")


def save_state(job: Job, parts: dict[str, Any], progress: Progress, processes: int) -> None:
    """Write what a run goes on from, atomically.

    Args:
        job: The run.
        parts: Objects with ``state_dict``, by name.
        progress: How far it is.
        processes: How many train together.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {
        "identity": job.identity(),
        "progress": dataclasses.asdict(progress),
        "processes": processes,
        "made_by": made_by(),
    }
    encoded = io.BytesIO()  # torch reports a full disk as an error of its own, not as OSError
    torch.save(state, encoded)
    with atomic_path(job.state) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def restore_state(job: Job, parts: dict[str, Any], device: torch.device) -> tuple[Progress, int]:
    """Put a run back to where :func:`save_state` left it.

    Returns:
        How far it is, and how many processes trained it.

    Raises:
        CheckpointError: There is no such run, or its file is damaged.
        ConfigError: It was started with other options, images or another teacher.
    """
    state = _read_state(job, device)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return Progress(**state["progress"]), state["processes"]


def _read_state(job: Job, device: torch.device) -> dict[str, Any]:
    """What :func:`save_state` wrote, of this very job."""
    if not job.state.is_file():
        raise CheckpointError(
            job.state, expected="a run to go on with", found="none", fix="leave --resume out"
        )
    try:
        state: dict[str, Any] = torch.load(job.state, map_location=device, weights_only=True)
        started_with: dict[str, str] = state["identity"]
        Progress(**state["progress"])
        int(state["processes"])
    except Exception as error:  # noqa: BLE001 - torch fails on damaged files in many ways
        raise CheckpointError(
            job.state,
            expected="the state of a run",
            found=f"a damaged file ({type(error).__name__})",
            fix="start again in a new folder",
        ) from None
    now = job.identity()
    if changed := [name for name in now if now[name] != started_with.get(name)]:
        raise ConfigError(
            job.config.out,
            expected="the options, images and teacher that the run was started with",
            found="others for " + ", ".join(changed),
            fix=f"repeat those in {job.config.out / CONFIG}, or choose another --out",
        )
    return state


def save_result(job: Job, model: nn.Module, record: dict[str, Any]) -> None:
    """Write the network with its spec and how it was made."""
    save_checkpoint(job.result, model, job.spec, json.dumps(record, default=str))


def provenance(job: Job, progress: Progress) -> dict[str, Any]:
    """How the network that is saved now was made, ready for JSON."""
    return {
        "kind": job.kind,
        "dataset": job.dataset.name,
        "data_hash": job.inputs["images"],
        "select": job.recipe.select,
        "epoch": progress.epoch,
        "epochs": job.recipe.epochs,
        "metrics": progress.history[-1],
        "recipe": dataclasses.asdict(job.recipe),
        "config": dataclasses.asdict(job.config),
        "seed": job.config.seed,
        **made_by(),
    }


def made_by() -> dict[str, Any]:
    """The code and the libraries that run."""
    return {
        "git_commit": git_commit(),
        "versions": {
            "efficientface_deploy": efficientface_deploy.__version__,
            "torch": str(torch.__version__),  # a class of its own, which no state may hold
            "python": platform.python_version(),
        },
    }


@functools.cache
def git_commit() -> str | None:
    """The commit of the clone that runs, with a + when files differ from it; None elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    try:
        result = subprocess.run(
            [*command, "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
