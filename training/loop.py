"""The training loop that teacher and student share: read it from top to bottom."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import efficientface_deploy
from efficientface_deploy.artifact import atomic_path, write_text
from efficientface_deploy.dataset import Dataset, Sample, iterate_batches
from efficientface_deploy.errors import CheckpointError, ConfigError
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

SELECTIONS = ("holdout", "validation", "test", "last")
STATE = "last.pt"

# Gives the target distribution of a batch: (images (N, 3, S, S), targets (N, C)) -> (N, C).
Teach = Callable[[Tensor, Tensor], Tensor]


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
        angle = torch.pi * (position - 0.2) / 0.8
        return float(self.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(angle))))


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on what, and where the results go.

    Attributes:
        kind: File stem of the result: ``student`` or ``teacher``.
        spec: The network's spec.
        recipe: How it is trained.
        dataset: The prepared data set.
        select: Which epoch is kept: best on ``holdout`` (a seeded tenth of train, then not trained
            on), ``validation`` or ``test`` (as published), or the ``last`` one.
        out: Folder of the run.
        seed: Of weights, order, augmentation and hold-out.
        resume: Go on from the folder's last epoch.
        workers: Processes that load images.
        device: ``auto``, ``cpu`` or ``cuda``.
        config: The command's options, saved with the result.
        votes: Train from the votes of the data set.
    """

    kind: str
    spec: ModelSpec
    recipe: Recipe
    dataset: Dataset
    select: str
    out: Path
    seed: int
    resume: bool
    workers: int
    device: str
    config: dict[str, Any]
    votes: bool = False


def train(job: Job, model: nn.Module, teach: Teach, device: torch.device) -> Path:
    """Train a network and keep its best epoch.

    Args:
        job: What, how and where.
        model: The network, on ``device``.
        teach: Gives the target distribution of a batch.
        device: Where to compute.

    Returns:
        The checkpoint of the chosen epoch, ``{kind}.safetensors``.
    """
    train_samples, selection_samples = choose_samples(job)
    recipe = job.recipe
    images = TrainingImages(
        train_samples,
        job.spec,
        AUGMENTATIONS[recipe.augmentation](job.spec),
        job.seed,
        votes=job.votes,
    )
    loader, sampler = training_loader(images, recipe.batch_size, job.seed, job.workers)

    model = model.to(memory_format=torch.channels_last)
    optimizer = recipe.optimizer(model)
    history = _start(job, model, optimizer, device)
    result = job.out / f"{job.kind}.safetensors"
    _announce(job, train_samples, selection_samples, device)

    for epoch in range(len(history), recipe.epochs):
        started = time.perf_counter()
        loss = _train_epoch(job, model, optimizer, teach, loader, sampler, epoch, device)
        seconds = time.perf_counter() - started
        row: dict[str, float] = {
            "epoch": epoch + 1,
            "loss": loss,
            "learning_rate": recipe.learning_rate_at(epoch + 1),
            "images_per_second": len(loader) * recipe.batch_size / seconds,
        }
        if selection_samples:
            predicted, labels = predict(model, selection_samples, job.spec, device)
            row["accuracy"] = accuracy(labels, predicted)
            row["macro_f1"] = macro_f1(labels, predicted, job.spec.num_classes)
        history.append(row)
        if _is_best(history):
            save_checkpoint(result, model, job.spec, _provenance(job, history))
        _save_state(job, model, optimizer, history)
        _write_curves(job, history)
        _print_row(row, seconds)
    return result


def choose_samples(job: Job) -> tuple[list[Sample], list[Sample]]:
    """The images to train on, and those that choose the epoch (none for ``last``)."""
    samples = list(job.dataset.split("train"))
    if job.select == "holdout":
        return hold_out(samples, job.seed)
    if job.select == "last":
        return samples, []
    return samples, list(job.dataset.split(job.select))


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
    with _progress() as progress:
        task = progress.add_task(f"epoch {epoch + 1}/{recipe.epochs}", total=len(loader), loss=0.0)
        for step, (images, targets) in enumerate(loader):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            targets = targets.to(device, non_blocking=True)  # (N, C)
            distribution = teach(images, targets)  # (N, C)
            loss = loss_function(model(images), distribution)
            if not torch.isfinite(loss):
                raise CheckpointError(
                    f"epoch {epoch + 1} step {step + 1}",
                    expected="a finite loss",
                    found=str(loss.item()),
                    fix="lower --learning-rate and go on with --resume",
                )
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(epoch + step / len(loader))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            progress.update(task, advance=1, loss=float(total) / (step + 1))
    return float(total) / len(loader)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
        transient=True,
    )


def _start(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> list[dict[str, float]]:
    """Make the run's folder, or go on where it stopped; returns the history so far."""
    state_path = job.out / STATE
    if job.resume:
        return _restore(job, model, optimizer, state_path, device)
    if state_path.exists() or (job.out / f"{job.kind}.safetensors").exists():
        raise ConfigError(
            job.out,
            expected="a new folder",
            found="another run",
            fix="choose another --out, or add --resume to go on with it",
        )
    job.out.mkdir(parents=True, exist_ok=True)
    write_text(job.out / "config.json", json.dumps(job.config, indent=2, default=str) + "\n")
    return []


def _restore(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: Path,
    device: torch.device,
) -> list[dict[str, float]]:
    if not path.is_file():
        raise CheckpointError(
            path, expected="a run to go on with", found="none", fix="leave --resume out"
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        same = state["recipe"] == dataclasses.asdict(job.recipe)
        same = same and state["spec"] == job.spec.to_json() and state["seed"] == job.seed
    except Exception as error:  # noqa: BLE001 - torch fails on damaged files in many ways
        raise CheckpointError(
            path,
            expected="the state of a run",
            found=f"a damaged file ({type(error).__name__})",
            fix="start again in a new folder",
        ) from None
    if not same:
        raise CheckpointError(
            path,
            expected="the recipe, network and seed that it was started with",
            found="others",
            fix=f"repeat the options in {job.out / 'config.json'}, or choose another --out",
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
        "recipe": dataclasses.asdict(job.recipe),
        "spec": job.spec.to_json(),
        "seed": job.seed,
    }
    with atomic_path(job.out / STATE) as temporary:
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
            "select": job.select,
            "epoch": len(history),
            "epochs": job.recipe.epochs,
            "metrics": history[-1],
            "recipe": dataclasses.asdict(job.recipe),
            "config": job.config,
            "seed": job.seed,
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
    write_text(job.out / "metrics.csv", table.getvalue())

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["loss"] for row in history], marker=".", label="training loss")
    axes.set(xlabel="epoch", ylabel="loss", title=f"{job.kind}, {job.dataset.name}")
    if "accuracy" in history[0]:
        right = axes.twinx()
        for key, colour in (("accuracy", "tab:green"), ("macro_f1", "tab:orange")):
            label = f"{key} on {job.select}"
            right.plot(epochs, [row[key] for row in history], ".-", color=colour, label=label)
        right.set(ylabel="score", ylim=(0, 1))
        right.legend(loc="lower right")
    axes.legend(loc="upper right")
    with atomic_path(job.out / "curves.png") as temporary:
        figure.savefig(temporary, dpi=120)


def _announce(
    job: Job, train_samples: list[Sample], selection: list[Sample], device: torch.device
) -> None:
    chosen = f"epoch chosen by {len(selection):,} images of {job.select}"
    print(
        f"{job.kind}: {job.spec.architecture} at {job.spec.input_size}x{job.spec.input_size} on "
        f"{len(train_samples):,} images of {job.dataset.name}, {device}; "
        + (chosen if selection else "the last epoch is kept")
    )


def _print_row(row: dict[str, float], seconds: float) -> None:
    scores = ""
    if "accuracy" in row:
        scores = f", accuracy {row['accuracy']:.4f}, macro-F1 {row['macro_f1']:.4f}"
    print(
        f"epoch {row['epoch']}: loss {row['loss']:.4f}{scores}, "
        f"{row['images_per_second']:.0f} images/s, {seconds:.0f} s",
        flush=True,
    )


def start_logging() -> None:
    """Show what the package logs, such as which head was made anew, on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    matplotlib.set_loglevel("warning")
