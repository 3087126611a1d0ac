"""The training loop that teacher and student share: read it from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from efficientface_deploy.command import signals_handled_by
from efficientface_deploy.errors import ConfigError, EfficientFaceError
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.dataset import Sample
from efficientface_deploy.workbench.evaluation import labels_of, predict
from efficientface_deploy.workbench.metrics import IndexArray, accuracy, confusion_matrix, macro_f1
from efficientface_deploy.workbench.progress import duration
from training.trainer import checkpointing
from training.trainer.config import AMP, Job, TrainerState
from training.trainer.distributed import Distributed
from training.trainer.inference import infer_with
from training.trainer.loader import HOLDOUT, BatchOrder, TrainingImages, TrainingLoader
from training.trainer.small_maps import use_matrix_products
from training.trainer.targets import LOSSES, TargetFunction
from training.trainer.temperature import calibrate
from training.trainer.tracking import EpochProgress, Tracker


class InterruptError(EfficientFaceError):
    """The user stopped a training."""

    exit_code = 130


def train(
    job: Job,
    model: nn.Module,
    images: TrainingImages,
    selection: Sequence[Sample],
    target_function: TargetFunction,
    dist: Distributed,
) -> TrainerState:
    """Train a network and keep its best epoch in ``{kind}.safetensors``.

    Args:
        job: What, on what and how.
        model: The network, with its first weights.
        images: What it is trained on, with targets.
        selection: What chooses the epoch; none keeps the last one.
        target_function: Gives the target distributions of a batch.
        dist: The processes that train together.

    Returns:
        What was reached.

    Raises:
        InterruptError: The user stopped it; the state is saved.
        ConfigError: The loss is not finite.
    """
    recipe, out = job.recipe, job.config.out
    inputs = {"images": images.content_hash(job.dataset.root), **job.inputs}
    job = dataclasses.replace(job, inputs=inputs)
    trainer = Trainer(job, model, images, target_function, dist)
    state = trainer.start()
    tracker = None
    if dist.is_main_process:
        _announce(job, images, selection, dist)
        title = f"{job.kind}, {job.dataset.name}"
        tracker = Tracker(out, title, recipe.select, job.config.tensorboard)

    with (
        contextlib.closing(trainer.loader),
        contextlib.closing(tracker) if tracker else contextlib.nullcontext(),
        _stop_requests() as stops,
    ):
        while state.epoch < recipe.epochs:
            trainer.train_epoch(state, stops, tracker)
            trainer.check_finite(state)
            row: dict[str, float] = {
                "epoch": state.epoch + 1,
                "loss": state.total_loss / trainer.order.steps,
                "learning_rate": trainer.optimizer.param_groups[0]["lr"],  # the last step's
                "images_per_second": trainer.order.images / state.seconds,
            }
            if selection:
                logits, labels = trainer.evaluate(selection)
                predicted = logits.argmax(axis=1)  # (N,)
                confusion = confusion_matrix(labels, predicted, job.spec.num_classes)  # (C, C)
                row["accuracy"] = accuracy(labels, predicted)
                row["macro_f1"] = macro_f1(confusion)
            seconds = state.seconds
            state = TrainerState(history=[*state.history, row])
            if tracker:
                # Without a selection the newest epoch is the best.
                best = max((past.get("accuracy", -1) for past in state.history[:-1]), default=-1)
                if row.get("accuracy", 1) > best:
                    record = checkpointing.provenance(job, state)
                    checkpointing.save_result(job, trainer.eval_model, record)
                trainer.save(state)
                tracker.add_epoch(state.history)
                _print_row(job, row, seconds)
    if dist.is_main_process and recipe.calibrate and recipe.select in (HOLDOUT, "validation"):
        calibrate(job, selection, dist.device)
    dist.barrier()
    return state


class Trainer:
    """The network and what changes with it in every step."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        images: TrainingImages,
        target_function: TargetFunction,
        dist: Distributed,
    ) -> None:
        recipe, config = job.recipe, job.config
        self.job, self.dist, self.target_function = job, dist, target_function
        self.order = BatchOrder(
            len(images),
            recipe.batch_size,
            config.seed,
            views=recipe.views,
            whole=recipe.whole_batches,
            rank=dist.rank,
            world_size=dist.world_size,
        )
        self.loader = TrainingLoader(images, self.order, config.workers)

        if config.sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.amp = AMP[config.amp]
        use_matrix_products(model, dist.device, self.amp)
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(memory_format=self.format).to(dist.device)
        self.optimizer = recipe.optimizer(self.model)
        self.ema = None
        if recipe.ema:
            update = _ema_update(recipe.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=update, use_buffers=True)
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=config.amp == "fp16")
        self.forward = dist.wrap(self.model)
        if config.compile:
            self.forward.compile()
        self.saved_at = time.monotonic()

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated and saved: the EMA where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def parts(self) -> dict[str, Any]:
        """What a state holds, by name."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts if self.ema is None else {**parts, "average": self.ema}

    def start(self) -> TrainerState:
        """Write the run's options down, or go on where it stopped."""
        if not self.job.config.resume:
            self.dist.barrier()  # nobody writes before all have started
            if self.dist.is_main_process:
                checkpointing.save_config(self.job)
            self.dist.barrier()
            return TrainerState()
        state, processes = checkpointing.restore_state(self.job, self.parts, self.dist.device)
        if self.dist.is_main_process:
            if processes != self.dist.world_size:
                print(
                    f"note: begun by {processes} processes, now {self.dist.world_size}: batch norm "
                    "sees other parts of a batch, and the weights will not be those of an unbroken "
                    "run"
                )
            print(f"going on after epoch {state.epoch}, step {state.step}")
        return state

    def save(self, state: TrainerState) -> None:
        """Write what ``--resume`` goes on from; the main process alone does.

        Raises:
            ConfigError: The weights are not finite; the state before stays.
        """
        if self.dist.is_main_process:
            self.check_finite(state)
            checkpointing.save_state(self.job, self.parts, state, self.dist.world_size)
        self.saved_at = time.monotonic()

    def check_finite(self, state: TrainerState) -> None:
        """Refuse weights that a step has spoilt, which the next step's loss would show.

        Raises:
            ConfigError: They are not finite.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters()):
            raise _diverged(self.job, "finite weights", "NaN or infinity", state)

    def train_epoch(self, state: TrainerState, stops: list[int], tracker: Tracker | None) -> None:
        """The rest of an epoch's steps; keeps ``state`` up to date."""
        recipe, steps = self.job.recipe, self.order.steps
        self.order.epoch, self.order.start = state.epoch, state.step
        self.forward.train()
        since = time.perf_counter() - state.seconds
        bar = EpochProgress(
            state.epoch, recipe.epochs, steps, recipe.batch_size, state.step, silent=tracker is None
        )
        with bar:
            for images, targets in self.loader:
                if tracker and state.epoch == state.step == 0:
                    tracker.add_views(images, self.job.spec)
                loss = self.train_step(images, targets, state)
                total, stop = self.dist.sum(loss, len(stops))
                state.total_loss += total / self.dist.world_size
                state.step += 1
                state.seconds = time.perf_counter() - since
                bar.update(state.step, state.total_loss / state.step)
                if stop:
                    self.save(state)
                    raise InterruptError(
                        self.job.config.out,
                        f"{recipe.epochs} epochs",
                        f"an interrupt in epoch {state.epoch + 1} after step {state.step}",
                        "add --resume to go on from there",
                    )
                if time.monotonic() - self.saved_at > 60 * self.job.config.save_minutes:
                    self.save(state)

    def train_step(self, images: Tensor, targets: Tensor, state: TrainerState) -> float:
        """One step of the optimiser on images (N, 3, S, S) with targets (N, C); its own loss."""
        recipe, device = self.job.recipe, self.dist.device
        dtype = next(self.model.parameters()).dtype
        images = images.to(device, dtype, non_blocking=True, memory_format=self.format)
        targets = targets.to(device, dtype, non_blocking=True)  # (N, C)
        distribution = self.target_function(images, targets)  # (N, C)
        with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
            logits = self.forward(images)  # (N, C)
        loss = LOSSES[recipe.loss](logits.to(dtype), distribution)
        if not torch.isfinite(loss):
            raise _diverged(self.job, "a finite loss", str(loss.item()), state)
        rate = recipe.learning_rate_at(state.epoch + state.step / self.order.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return float(loss.detach())

    def evaluate(self, samples: Sequence[Sample]) -> tuple[Float32Array, IndexArray]:
        """Logits (N, C) and labels (N,) of the saved network; every rank does its share."""
        rank, world_size = self.dist.rank, self.dist.world_size
        self.dist.broadcast_buffers(self.eval_model)
        infer = infer_with(self.eval_model, self.job.spec, self.dist.device)
        parts = self.dist.gather(predict(infer, samples[rank::world_size], self.job.spec))
        order = [sample for first in range(world_size) for sample in samples[first::world_size]]
        return np.concatenate(parts), labels_of(order)


def _ema_update(decay: float) -> Callable[[Any, Any, Any], None]:
    """An average that forgets faster at first, so that the first weights soon have no share.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage.
    """

    def update(averages: Any, weights: Any, steps: Any) -> None:
        now = min(decay, (1 + int(steps)) / (10 + int(steps)))
        get_ema_multi_avg_fn(now)(averages, weights, steps)  # type: ignore[no-untyped-call]

    return update


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """The signals by which the user asks for an end; a second one ends at once.

    Unlike ``command``'s handlers these raise nothing: a step that has begun is finished, so that
    the saved state is never one between two steps.
    """
    requests: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    with signals_handled_by({signal.SIGINT: request, signal.SIGTERM: request}):
        yield requests


def _diverged(job: Job, expected: str, found: str, state: TrainerState) -> ConfigError:
    again = "start again with a smaller --learning-rate or --weight-decay"
    good = f"; {job.result} is the best epoch before" if job.result.exists() else ""
    recipe = job.recipe
    return ConfigError(
        f"learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}",
        expected,
        f"{found} in epoch {state.epoch + 1} step {state.step + 1}",
        again + (" in a new --out" if job.state.exists() else "") + good,
    )


def _announce(
    job: Job, images: TrainingImages, selection: Sequence[Sample], dist: Distributed
) -> None:
    chosen = f"{len(selection):,} images of {job.recipe.select} choose the epoch"
    where = dist.device.type + (f", {dist.world_size} processes" if dist.world_size > 1 else "")
    print(
        f"{job.kind}: {job.spec.architecture} at {job.spec.input_size}x{job.spec.input_size} on "
        f"{len(images):,} images of {job.dataset.name}, {where};\n"
        f"  {chosen if selection else 'the last epoch is kept'}",
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
