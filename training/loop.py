"""The training loop that teacher and student share: read it from top to bottom."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

import efficientface_deploy
from efficientface_deploy.artifact import atomic_path, write_text
from efficientface_deploy.command import option
from efficientface_deploy.dataset import Dataset, Sample, iterate_batches
from efficientface_deploy.errors import CheckpointError, ConfigError, EfficientFaceError
from efficientface_deploy.metrics import accuracy, macro_f1
from efficientface_deploy.models import save_checkpoint
from efficientface_deploy.preprocess import normalise
from efficientface_deploy.spec import ModelSpec
from training.data import (
    AUGMENTATIONS,
    Batch,
    EpochSampler,
    TrainingImages,
    hold_out,
    training_loader,
)
from training.losses import LOSSES
from training.progress import TrainingProgress, duration

SELECTIONS = ("holdout", "validation", "test", "last")
CONFIG = "config.json"

# What may change when a run goes on.
_FREE_OPTIONS = ("out", "workers", "device", "resume")

# Gives the target distribution of a batch: (images (N, 3, S, S), targets (N, C)) -> (N, C).
Teach = Callable[[Tensor, Tensor], Tensor]


def labels_as_targets(images: Tensor, targets: Tensor) -> Tensor:
    """The data set's own targets, (N, C), unchanged."""
    return targets


class InterruptError(EfficientFaceError):
    """The user stopped a training."""

    exit_code = 130


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images of one step.
        learning_rate: Largest learning rate of SGD with momentum 0.9.
        weight_decay: L2 penalty on all weights.
        schedule: ``step`` (multiplied by ``decay`` every ``step_epochs``) or ``one-cycle``.
        loss: Name in :data:`training.losses.LOSSES`.
        augmentation: Name in :data:`training.data.AUGMENTATIONS`.
        nesterov: Nesterov's momentum.
        step_epochs: Epochs between two steps.
        decay: Factor of a step.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: str
    loss: str
    augmentation: str
    nesterov: bool = False
    step_epochs: int = 30
    decay: float = 0.1

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD over all parameters."""
        return torch.optim.SGD(
            model.parameters(),
            lr=self.learning_rate,
            momentum=0.9,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )

    def learning_rate_at(self, progress: float) -> float:
        """Learning rate at ``progress`` epochs (a fraction within an epoch counts)."""
        if self.schedule == "step":
            return float(self.learning_rate * self.decay ** int(progress // self.step_epochs))
        # One cycle (Smith 2018): up linearly over the first fifth, then down a cosine to zero.
        position = progress / self.epochs
        if position < 0.2:
            return self.learning_rate * (0.04 + 0.96 * position / 0.2)
        angle = math.pi * (position - 0.2) / 0.8
        return self.learning_rate * 0.5 * (1 + math.cos(angle))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options that teacher and student share."""

    data: Path = option(help="a prepared data set")
    out: Path = option(help="folder of the run")
    init: Path | None = option(None, help="start from this checkpoint; a foreign head is left")
    preset: str | None = option(None, help="what numbered folders mean, without dataset.json")
    input_size: int | None = option(None, help="side of the input; default: the preset's")
    epochs: int | None = option(None, minimum=1, help="passes; default: the recipe's")
    batch_size: int | None = option(None, minimum=2, help="images of a step; default: the recipe's")
    learning_rate: float | None = option(None, minimum=0, help="largest; default: the recipe's")
    select: str = option("holdout", choices=SELECTIONS, help="what chooses the epoch to keep")
    seed: int = option(0, minimum=0, help="of weights, order and augmentation")
    workers: int = option(1, minimum=0, help="processes that load images")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    resume: bool = option(False, help="go on with the run in --out")

    def change(self, recipe: Recipe) -> Recipe:
        """The recipe with what the command line says otherwise."""
        names = ("epochs", "batch_size", "learning_rate")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(recipe, **given)

    def model_spec(self, dataset: Dataset, architecture: str) -> ModelSpec:
        """The spec of the network that is trained on this data set."""
        size = dataset.spec.input_size if self.input_size is None else self.input_size
        return dataset.spec.replace(architecture=architecture, input_size=size)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on what, and how.

    Attributes:
        kind: File stem of the result: ``student`` or ``teacher``.
        spec: The network's spec.
        recipe: How it is trained.
        dataset: The prepared data set.
        config: The command's options. Its ``select`` says which epoch is kept: best on ``holdout``
            (a seeded tenth of train, then not trained on), ``validation`` or ``test`` (as
            published), or the ``last`` one.
        votes: Train from the votes of the data set.
    """

    kind: str
    spec: ModelSpec
    recipe: Recipe
    dataset: Dataset
    config: TrainConfig
    votes: bool = False

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
        fixed = {name: str(value) for name, value in settings.items() if name not in _FREE_OPTIONS}
        return {**fixed, "spec": self.spec.to_json()}


def train(job: Job, model: nn.Module, teach: Teach, device: torch.device) -> Path:
    """Train a network and keep its best epoch.

    Args:
        job: What, on what and how.
        model: The network, on ``device``.
        teach: Gives the target distribution of a batch.
        device: Where to compute.

    Returns:
        The checkpoint of the chosen epoch, ``{kind}.safetensors``.
    """
    recipe, seed = job.recipe, job.config.seed
    train_samples, selection_samples = choose_samples(job)
    augmentation = AUGMENTATIONS[recipe.augmentation](job.spec)
    images = TrainingImages(train_samples, job.spec, augmentation, seed, votes=job.votes)
    loader, sampler = training_loader(images, recipe.batch_size, seed, job.config.workers)

    model = model.to(memory_format=torch.channels_last)
    optimizer = recipe.optimizer(model)
    history = _start(job, model, optimizer, device)
    _announce(job, train_samples, selection_samples, device)

    try:
        for epoch in range(len(history), recipe.epochs):
            started = time.perf_counter()
            loss = _train_epoch(job, model, optimizer, teach, loader, sampler, epoch, device)
            seconds = time.perf_counter() - started
            row: dict[str, float] = {
                "epoch": epoch + 1,
                "loss": loss,
                "learning_rate": optimizer.param_groups[0]["lr"],  # the last step's
                "images_per_second": len(loader) * recipe.batch_size / seconds,
            }
            if selection_samples:
                predicted, labels = predict(model, selection_samples, job.spec, device)
                row["accuracy"] = accuracy(labels, predicted)
                row["macro_f1"] = macro_f1(labels, predicted, job.spec.num_classes)
            history.append(row)
            if _is_best(history):
                save_checkpoint(job.result, model, job.spec, _provenance(job, history))
            _save_state(job, model, optimizer, history)
            _write_curves(job, history)
            _print_row(job, row, seconds)
    except KeyboardInterrupt:
        raise InterruptError(
            job.config.out,
            expected=f"{recipe.epochs} epochs",
            found="an interrupt",
            fix="add --resume to go on from the last whole epoch"
            if job.state.exists()
            else "no epoch was finished: start again",
        ) from None
    return job.result


def choose_samples(job: Job) -> tuple[list[Sample], list[Sample]]:
    """The images to train on, and those that choose the epoch (none for ``last``)."""
    samples = list(job.dataset.split("train"))
    if job.config.select == "holdout":
        return hold_out(samples, job.config.seed)
    if job.config.select == "last":
        return samples, []
    return samples, list(job.dataset.split(job.config.select))


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        ConfigError: ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda", expected="a CUDA device", found="none", fix="leave --device out"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def predict(
    model: nn.Module, samples: Sequence[Sample], spec: ModelSpec, device: torch.device
) -> tuple[Any, Any]:
    """Predicted classes and labels, int (N,) each, by the runtime's own preprocessing."""
    model.eval()
    predicted, labels = [], []
    with torch.inference_mode():
        for images, batch_labels in iterate_batches(samples, spec, 128):
            batch = torch.from_numpy(normalise(images, spec)).to(device)  # (N, 3, S, S)
            batch = batch.to(memory_format=torch.channels_last)
            predicted.append(model(batch).argmax(dim=1).cpu())
            labels.append(torch.from_numpy(batch_labels))
    return torch.cat(predicted).numpy(), torch.cat(labels).numpy()


def _train_epoch(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    teach: Teach,
    loader: DataLoader[Batch],
    sampler: EpochSampler,
    epoch: int,
    device: torch.device,
) -> float:
    """One pass over the images; returns the mean loss."""
    recipe = job.recipe
    loss_function = LOSSES[recipe.loss]
    sampler.epoch = epoch
    model.train()
    total = torch.zeros((), device=device)
    with TrainingProgress(epoch, recipe.epochs, len(loader), recipe.batch_size) as progress:
        for step, (images, targets) in enumerate(loader):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            targets = targets.to(device, non_blocking=True)  # (N, C)
            distribution = teach(images, targets)  # (N, C)
            loss = loss_function(model(images), distribution)
            if not torch.isfinite(loss):
                raise ConfigError(
                    f"learning rate {recipe.learning_rate:g}",
                    expected="a finite loss",
                    found=f"{loss.item()} in epoch {epoch + 1} step {step + 1}",
                    fix="give a lower --learning-rate and a new --out",
                )
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(epoch + step / len(loader))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach()
            progress.update(step + 1, float(total) / (step + 1))
    return float(total) / len(loader)


def _start(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> list[dict[str, float]]:
    """Make the run's folder, or go on where it stopped; returns the history so far."""
    if job.config.resume:
        return _restore(job, model, optimizer, device)
    out = job.config.out
    if job.state.exists() or job.result.exists():
        raise ConfigError(
            out,
            expected="a new folder",
            found="another run",
            fix="choose another --out, or "
            + ("add --resume to go on with it" if job.state.exists() else "remove it"),
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CONFIG, json.dumps(job.settings(), indent=2, default=str) + "\n")
    return []


def _restore(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> list[dict[str, float]]:
    if not job.state.is_file():
        raise CheckpointError(
            job.state, expected="a run to go on with", found="none", fix="leave --resume out"
        )
    try:
        state = torch.load(job.state, map_location=device, weights_only=True)
        started_with: dict[str, str] = state["identity"]
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
            expected="the options that the run was started with",
            found="others for " + ", ".join(changed),
            fix=f"repeat those in {job.config.out / CONFIG}, or choose another --out",
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    history: list[dict[str, float]] = state["history"]
    print(f"going on after epoch {len(history)}")
    return history


def _save_state(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, float]]
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "identity": job.identity(),
    }
    with atomic_path(job.state) as temporary:
        torch.save(state, temporary)


def _is_best(history: list[dict[str, float]]) -> bool:
    """Whether the newest epoch is the one to keep; without a selection split, always."""
    if "accuracy" not in history[-1]:
        return True
    return all(history[-1]["accuracy"] > row["accuracy"] for row in history[:-1])


def _provenance(job: Job, history: list[dict[str, float]]) -> str:
    return json.dumps(
        {
            "kind": job.kind,
            "dataset": job.dataset.name,
            "select": job.config.select,
            "epoch": len(history),
            "epochs": job.recipe.epochs,
            "metrics": history[-1],
            "recipe": dataclasses.asdict(job.recipe),
            "config": dataclasses.asdict(job.config),
            "seed": job.config.seed,
            "versions": {
                "efficientface_deploy": efficientface_deploy.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
        default=str,
    )


def _write_curves(job: Job, history: list[dict[str, float]]) -> None:
    """``metrics.csv`` and ``curves.png``."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(job.config.out / "metrics.csv", table.getvalue())

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["loss"] for row in history], marker=".", label="training loss")
    axes.set(xlabel="epoch", ylabel="loss", title=f"{job.kind}, {job.dataset.name}")
    if "accuracy" in history[0]:
        right = axes.twinx()
        for key, colour in (("accuracy", "tab:green"), ("macro_f1", "tab:orange")):
            label = f"{key} on {job.config.select}"
            right.plot(epochs, [row[key] for row in history], ".-", color=colour, label=label)
        right.set(ylabel="score", ylim=(0, 1))
        right.legend(loc="lower right")
    axes.legend(loc="upper right")
    with atomic_path(job.config.out / "curves.png") as temporary:
        figure.savefig(temporary, dpi=120)


def _announce(
    job: Job, train_samples: list[Sample], selection: list[Sample], device: torch.device
) -> None:
    chosen = f"epoch chosen by {len(selection):,} images of {job.config.select}"
    print(
        f"{job.kind}: {job.spec.architecture} at {job.spec.input_size}x{job.spec.input_size} on "
        f"{len(train_samples):,} images of {job.dataset.name}, {device}; "
        + (chosen if selection else "the last epoch is kept"),
        flush=True,
    )


def _print_row(job: Job, row: dict[str, float], seconds: float) -> None:
    scores = ""
    if "accuracy" in row:
        scores = f", accuracy {row['accuracy']:.4f}, macro-F1 {row['macro_f1']:.4f}"
    print(
        f"epoch {row['epoch']}/{job.recipe.epochs}: loss {row['loss']:.4f}{scores}, "
        f"{row['images_per_second']:.0f} images/s, {duration(seconds)}",
        flush=True,
    )


def start_logging() -> None:
    """Show what the package logs, such as which head was made anew, on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    matplotlib.set_loglevel("WARNING")
