"""The training loop that teacher and student share: read it from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from efficientface_deploy.errors import ConfigError, EfficientFaceError
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.dataset import Sample
from efficientface_deploy.workbench.metrics import IndexArray, accuracy, confusion_matrix, macro_f1
from efficientface_deploy.workbench.progress import duration
from training.plots import write_curves
from training.trainer.checkpointing import (
    provenance,
    restore_state,
    save_result,
    save_state,
    start_run,
)
from training.trainer.config import Job, Progress, TrainConfig
from training.trainer.distributed import Ranks
from training.trainer.loader import HOLDOUT, BatchOrder, TrainingImages, training_loader
from training.trainer.small_maps import use_matrix_products
from training.trainer.targets import LOSSES, Teach
from training.trainer.temperature import calibrate, predict
from training.trainer.tracking import EventWriter, TrainingProgress


class InterruptError(EfficientFaceError):
    """The user stopped a training."""

    exit_code = 130


def train(
    job: Job,
    model: nn.Module,
    images: TrainingImages,
    selection: Sequence[Sample],
    teach: Teach,
    ranks: Ranks,
) -> Progress:
    """Train a network and keep its best epoch in ``{kind}.safetensors``.

    Args:
        job: What, on what and how.
        model: The network, with its first weights.
        images: What it is trained on, with targets.
        selection: What chooses the epoch; none keeps the last one.
        teach: Gives the target distribution of a batch.
        ranks: The processes that train together.

    Returns:
        What was reached.

    Raises:
        InterruptError: The user stopped it; the state is saved.
        ConfigError: The loss is not finite.
    """
    inputs = {"images": images.content_hash(job.dataset.root), **job.inputs}
    job = dataclasses.replace(job, inputs=inputs)
    trainer = Trainer(job, model, images, teach, ranks)
    progress = trainer.start()
    if ranks.is_first:
        _announce(job, images, selection, ranks)
    events = EventWriter(job.config.out) if job.config.tensorboard and ranks.is_first else None

    with (
        contextlib.closing(trainer.loader),
        contextlib.closing(events) if events else contextlib.nullcontext(),
        _StopRequest() as stop,
    ):
        while progress.epoch < job.recipe.epochs:
            trainer.train_epoch(progress, stop, events)
            trainer.check_finite(progress)
            row: dict[str, float] = {
                "epoch": progress.epoch + 1,
                "loss": progress.total_loss / trainer.order.steps,
                "learning_rate": trainer.optimizer.param_groups[0]["lr"],  # the last step's
                "images_per_second": trainer.order.images / progress.seconds,
            }
            if selection:
                logits, labels = trainer.judge(selection)
                predicted = logits.argmax(axis=1)
                row["accuracy"] = accuracy(labels, predicted)
                row["macro_f1"] = macro_f1(
                    confusion_matrix(labels, predicted, job.spec.num_classes)
                )
            seconds = progress.seconds
            progress = Progress(history=[*progress.history, row])
            if ranks.is_first:
                if _is_best(progress.history):
                    save_result(job, trainer.kept, provenance(job, progress))
                trainer.save(progress)
                title = f"{job.kind}, {job.dataset.name}"
                write_curves(job.config.out, progress.history, title, job.recipe.select)
                if events:
                    events.add_row(row)
                _print_row(job, row, seconds)
    if ranks.is_first and job.recipe.calibrate and job.recipe.select in (HOLDOUT, "validation"):
        calibrate(job, selection, ranks.device)
    ranks.wait()
    return progress


class Trainer:
    """The network and what changes with it in every step."""

    def __init__(
        self, job: Job, model: nn.Module, images: TrainingImages, teach: Teach, ranks: Ranks
    ) -> None:
        recipe, config = job.recipe, job.config
        self.job, self.ranks, self.teach = job, ranks, teach
        self.order = BatchOrder(
            len(images),
            recipe.batch_size,
            config.seed,
            views=recipe.views,
            whole=recipe.whole_batches,
            rank=ranks.rank,
            ranks=ranks.size,
        )
        self.loader = training_loader(images, self.order, config.workers)

        if config.sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.amp = config.amp_type
        use_matrix_products(model, ranks.device, self.amp)
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(memory_format=self.format).to(ranks.device)
        self.optimizer = recipe.optimizer(self.model)
        self.average = None
        if recipe.ema:
            average = _moving_average(recipe.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")
        self.forward = ranks.wrap(self.model)
        if config.compile:
            self.forward.compile()
        self.saved_at = time.monotonic()

    @property
    def kept(self) -> nn.Module:
        """The network that is judged and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def parts(self) -> dict[str, Any]:
        """What a state holds, by name."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts if self.average is None else {**parts, "average": self.average}

    def start(self) -> Progress:
        """Make the run's folder, or go on where it stopped."""
        if self.job.config.resume:
            progress, processes = restore_state(self.job, self.parts, self.ranks.device)
            if self.ranks.is_first and processes != self.ranks.size:
                print(
                    f"note: begun by {processes} processes, now {self.ranks.size}: batch norm sees "
                    "other parts of a batch, and the weights will not be those of an unbroken run"
                )
            if self.ranks.is_first:
                print(f"going on after epoch {progress.epoch}, step {progress.step}")
            return progress
        self.ranks.wait()  # nobody makes the folder before all have started
        if self.ranks.is_first:
            start_run(self.job)
        self.ranks.wait()
        return Progress()

    def save(self, progress: Progress) -> None:
        """Write the state that ``--resume`` goes on from; the first rank alone does.

        Raises:
            ConfigError: The weights are not finite; the state before stays.
        """
        if self.ranks.is_first:
            self.check_finite(progress)
            save_state(self.job, self.parts, progress, self.ranks.size)
        self.saved_at = time.monotonic()

    def check_finite(self, progress: Progress) -> None:
        """Refuse weights that a step has spoilt, which the next step's loss would show.

        Raises:
            ConfigError: They are not finite.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters()):
            raise _diverged(self.job, "finite weights", "NaN or infinity", progress)

    def train_epoch(
        self, progress: Progress, stop: _StopRequest, events: EventWriter | None
    ) -> None:
        """The rest of an epoch's steps; keeps ``progress`` up to date."""
        recipe, steps = self.job.recipe, self.order.steps
        self.order.epoch, self.order.start = progress.epoch, progress.step
        self.forward.train()
        since = time.perf_counter() - progress.seconds
        with TrainingProgress(
            progress.epoch, recipe.epochs, steps, recipe.batch_size, progress.step, self.ranks.rank
        ) as shown:
            for images, targets in self.loader:
                if events and progress.epoch == progress.step == 0:
                    events.add_views(images, self.job.spec)
                loss = self.train_step(images, targets, progress)
                total, stops = self.ranks.sums(loss, stop.requested)
                progress.total_loss += total / self.ranks.size
                progress.step += 1
                progress.seconds = time.perf_counter() - since
                shown.update(progress.step, progress.total_loss / progress.step)
                if stops:
                    self.save(progress)
                    raise _interrupted(self.job, progress)
                if time.monotonic() - self.saved_at > 60 * self.job.config.save_minutes:
                    self.save(progress)

    def train_step(self, images: Tensor, targets: Tensor, progress: Progress) -> float:
        """One step of the optimiser on images (N, 3, S, S) with targets (N, C); its own loss."""
        recipe, device = self.job.recipe, self.ranks.device
        dtype = next(self.model.parameters()).dtype
        images = images.to(
            device, dtype, non_blocking=True, memory_format=self.format
        )  # (N, 3, S, S)
        targets = targets.to(device, dtype, non_blocking=True)  # (N, C)
        distribution = self.teach(images, targets)  # (N, C)
        with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
            logits = self.forward(images)  # (N, C)
        loss = LOSSES[recipe.loss](logits.to(dtype), distribution)
        if not torch.isfinite(loss):
            raise _diverged(self.job, "a finite loss", str(loss.item()), progress)
        rate = recipe.learning_rate_at(progress.epoch + progress.step / self.order.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return float(loss.detach())

    def judge(self, samples: Sequence[Sample]) -> tuple[Float32Array, IndexArray]:
        """Logits (N, C) and labels (N,) of the kept network; every rank does its share."""
        self.ranks.share_buffers(self.kept)
        own = samples[self.ranks.rank :: self.ranks.size]
        parts = self.ranks.gather(predict(self.kept, own, self.job.spec, self.ranks.device))
        return np.concatenate([part[0] for part in parts]), np.concatenate(
            [part[1] for part in parts]
        )


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An average that forgets faster at first, so that the first weights soon have no share.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage.
    """

    def update(averages: Any, weights: Any, steps: Any) -> None:
        now = min(decay, (1 + int(steps)) / (10 + int(steps)))
        get_ema_multi_avg_fn(now)(averages, weights, steps)  # type: ignore[no-untyped-call]

    return update


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Refuse options that this device does not have.

    Raises:
        ConfigError: fp16 or SyncBatchNorm on a CPU.
    """
    check_amp("--amp", config.amp, device)
    if config.sync_batch_norm and device.type == "cpu":
        raise ConfigError(
            "--sync-batch-norm", "CUDA devices", "a CPU", "leave --sync-batch-norm out"
        )


def check_amp(name: str, amp: str, device: torch.device) -> None:
    """Refuse a precision in which this device would not compute.

    Args:
        name: The option.
        amp: Its value.
        device: Where the training computes.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    if amp == "fp16" and device.type == "cpu":
        raise ConfigError(f"{name} fp16", "a CUDA device", "a CPU", f"leave {name} out")


class _StopRequest:
    """Ctrl-C or SIGTERM asks for an end after the step; a second one ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> _StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _interrupted(job: Job, progress: Progress) -> InterruptError:
    return InterruptError(
        job.config.out,
        expected=f"{job.recipe.epochs} epochs",
        found=f"an interrupt in epoch {progress.epoch + 1} after step {progress.step}",
        fix="add --resume to go on from there",
    )


def _diverged(job: Job, expected: str, found: str, progress: Progress) -> ConfigError:
    again = "start again with a smaller --learning-rate or --weight-decay"
    good = f"; {job.result} is the best epoch before" if job.result.exists() else ""
    recipe = job.recipe
    return ConfigError(
        f"learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}",
        expected,
        f"{found} in epoch {progress.epoch + 1} step {progress.step + 1}",
        again + (" in a new --out" if job.state.exists() else "") + good,
    )


def _is_best(history: list[dict[str, float]]) -> bool:
    """Whether the newest epoch is the one to keep; without a selection split, always."""
    if "accuracy" not in history[-1]:
        return True
    return all(history[-1]["accuracy"] > row["accuracy"] for row in history[:-1])


def _announce(job: Job, images: TrainingImages, selection: Sequence[Sample], ranks: Ranks) -> None:
    chosen = f"epoch chosen by {len(selection):,} images of {job.recipe.select}"
    where = f"{ranks.device.type}" + (f", {ranks.size} processes" if ranks.size > 1 else "")
    print(
        f"{job.kind}: {job.spec.architecture} at {job.spec.input_size}x{job.spec.input_size} on "
        f"{len(images):,} images of {job.dataset.name}, {where}; "
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
