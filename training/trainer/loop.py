"""The training loop that teacher and student share: read it from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn

from efficientface_deploy.command import signals_handled_by
from efficientface_deploy.errors import ConfigError, EfficientFaceError, words_of
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.dataset import Sample
from efficientface_deploy.workbench.evaluation import labels_of, predict
from efficientface_deploy.workbench.metrics import IndexArray, accuracy, confusion_matrix, macro_f1
from efficientface_deploy.workbench.progress import duration
from training.trainer import checkpointing
from training.trainer.calibration import calibrate
from training.trainer.checkpointing import VIEWS
from training.trainer.config import Job, TrainerState
from training.trainer.distributed import Distributed
from training.trainer.inference import infer_pixels, infer_with
from training.trainer.loader import HOLDOUT, Batch, BatchOrder, TrainingImages, TrainingLoader
from training.trainer.pictures import Pictures
from training.trainer.step import TrainingStep
from training.trainer.targets import TargetFunction
from training.trainer.tracking import EpochProgress, Tracker

_SETTLE_SECONDS = 1.0  # between two looks at the loss, for which a GPU's queue must run empty


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
    read = {"images": images.content_hash(job.dataset.root), "labels": images.labels_hash()}
    job = dataclasses.replace(job, inputs={**read, **job.inputs})
    trainer = Trainer(job, model, images, target_function, dist)
    state = trainer.start()
    tracker = None
    if dist.is_main_process:
        _announce(job, selection, trainer)
        title = f"{job.kind}, {job.dataset.name}"
        tracker = Tracker(out, title, recipe.select, job.config.tensorboard)
        if state.history:
            tracker.set_history(state.history)

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
                "learning_rate": trainer.rate_at(state.epoch, trainer.order.steps - 1),
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
    """A training's batches and steps, and how far it is."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        images: TrainingImages,
        target_function: TargetFunction,
        dist: Distributed,
    ) -> None:
        recipe, config = job.recipe, job.config
        self.job, self.dist = job, dist
        self.order = BatchOrder(
            len(images),
            recipe.batch_size,
            config.seed,
            views=recipe.views,
            whole=recipe.whole_batches,
            rank=dist.rank,
            world_size=dist.world_size,
        )
        self.loader = TrainingLoader(
            images, self.order, config.workers, dist.device, dist.world_size
        )
        self.step = TrainingStep(recipe, config, model, target_function, self.loader.render, dist)
        self.selection: Pictures | None = None
        self.saved_at = self.settled_at = time.monotonic()
        # Of this epoch, on the device: the sum of its losses, and after how many of its steps that
        # was finite; once it is not, it stays so.
        self.total = torch.zeros((), dtype=torch.float64, device=dist.device)
        self.finite = torch.zeros((), dtype=torch.int64, device=dist.device)

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated and saved: the EMA where there is one."""
        return self.step.model if self.step.ema is None else self.step.ema.module

    def start(self) -> TrainerState:
        """Write the run's options down, or go on where it stopped."""
        if not self.job.config.resume:
            self.dist.barrier()  # nobody writes before all have started
            if self.dist.is_main_process:
                checkpointing.save_config(self.job)
            self.dist.barrier()
            return TrainerState()
        state, processes, views = checkpointing.restore_state(
            self.job, self.step.parts, self.dist.device
        )
        self.step.restored()
        if self.dist.is_main_process:
            if processes != self.dist.world_size:
                print(
                    f"note: begun by {processes} processes, now {self.dist.world_size}: batch norm "
                    "sees other parts of a batch, and the weights will not be those of an unbroken "
                    "run"
                )
            if views != VIEWS:
                print(
                    "note: begun by a version that drew its views otherwise: the weights will not "
                    "be those of an unbroken run"
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
            checkpointing.save_state(self.job, self.step.parts, state, self.dist.world_size)
        self.saved_at = time.monotonic()

    def check_finite(self, state: TrainerState) -> None:
        """Refuse weights that a step has spoilt, which the next step's loss would show.

        Raises:
            ConfigError: They are not finite.
        """
        weights = self.step.model.parameters()
        if not torch.stack([torch.isfinite(weight).all() for weight in weights]).all():
            raise _diverged(self.job, "finite weights", "NaN or infinity", state, state.step)

    def train_epoch(self, state: TrainerState, stops: list[int], tracker: Tracker | None) -> None:
        """The rest of an epoch's steps; keeps ``state`` up to date."""
        recipe, config, steps = self.job.recipe, self.job.config, self.order.steps
        self.order.epoch, self.order.start = state.epoch, state.step
        train_mode(self.step.forward)
        self.total.fill_(state.total_loss)
        self.finite.fill_(state.step)
        since = time.perf_counter() - state.seconds
        bar = EpochProgress(
            state.epoch, recipe.epochs, steps, recipe.batch_size, state.step, silent=tracker is None
        )
        with bar:
            for batch in self.loader:
                if tracker and state.epoch == state.step == 0:
                    tracker.add_views(self.loader.render(batch), self.job.spec)
                loss = self.train_step(batch, state)
                total, stop = self.dist.sum(loss, len(stops))
                self.total += total / self.dist.world_size
                self.finite += torch.isfinite(self.total)
                state.step += 1
                save = time.monotonic() - self.saved_at > 60 * config.save_minutes
                last = state.step == steps
                if stop or save or last or time.monotonic() - self.settled_at > _SETTLE_SECONDS:
                    self._settle(state)
                    bar.update(state.step, state.total_loss / state.step)
                state.seconds = time.perf_counter() - since
                if stop:
                    self.save(state)
                    raise InterruptError(
                        config.out,
                        f"{recipe.epochs} epochs",
                        f"an interrupt in epoch {state.epoch + 1} after step {state.step}",
                        "add --resume to go on from there",
                    )
                if save:
                    self.save(state)

    def rate_at(self, epoch: int, step: int) -> float:
        """The learning rate of a step."""
        return self.job.recipe.learning_rate_at(epoch + step / self.order.steps)

    def train_step(self, batch: Batch, state: TrainerState) -> Tensor:
        """One step on a batch of this process; its own loss, a scalar on the device.

        Raises:
            ConfigError: The GPU has not the memory for it.
        """
        rate = self.rate_at(state.epoch, state.step)
        done = state.epoch * self.order.steps + state.step
        try:
            return self.step(batch, rate, done)
        except torch.OutOfMemoryError as error:
            found = words_of(error)
        raise self._out_of_memory(batch, found)

    def _out_of_memory(self, batch: Batch, found: str) -> ConfigError:
        """Try smaller batches: the training is at its end, and its state lies on the disk."""
        size = len(batch.pixels)
        fix = "give a smaller --input-size"
        while size > 2:
            size //= 2
            with contextlib.suppress(torch.OutOfMemoryError):
                torch.cuda.empty_cache()
                self.step(Batch(*(part[:size] for part in batch)), 0.0, 0)
                fix = f"give --batch-size {size * self.dist.world_size}, which fits"
                break
        name = f"--batch-size {self.job.recipe.batch_size}"
        return ConfigError(name, "a GPU with the memory for it", found, fix)

    def _settle(self, state: TrainerState) -> None:
        """Wait for the device, and write down the loss so far.

        Raises:
            ConfigError: A step's loss was not finite; says which.
        """
        state.total_loss, finite = float(self.total), int(self.finite)
        self.settled_at = time.monotonic()
        if finite < state.step:
            found = str(state.total_loss)
            raise _diverged(self.job, "a finite loss", found, state, finite + 1)

    def evaluate(self, samples: Sequence[Sample]) -> tuple[Float32Array, IndexArray]:
        """Logits (N, C) and labels (N,) of the saved network; every rank does its share."""
        rank, world_size = self.dist.rank, self.dist.world_size
        self.dist.broadcast_buffers(self.eval_model)
        own, spec = samples[rank::world_size], self.job.spec
        if self.selection is None:
            # It may be read in every epoch though the training images must be kept.
            on_device = "no" if self.job.config.data_on_device == "no" else "auto"
            self.selection = Pictures(own, spec, on_device)
        kept = self.selection.keep(self.dist.device, world_size)
        if kept is None:
            logits = predict(infer_with(self.eval_model, spec, self.dist.device), own, spec)
        else:
            logits = infer_pixels(self.eval_model, spec, kept)
        parts = self.dist.gather(logits)
        order = [sample for first in range(world_size) for sample in samples[first::world_size]]
        return np.concatenate(parts), labels_of(order)


def train_mode(model: nn.Module) -> None:
    """Let a network learn, but for layers with frozen weights: their statistics stay, too."""
    for module in model.train().modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


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


def _diverged(job: Job, expected: str, found: str, state: TrainerState, step: int) -> ConfigError:
    again = "start again with a smaller --learning-rate or --weight-decay"
    good = f"; {job.result} is the best epoch before" if job.result.exists() else ""
    recipe = job.recipe
    return ConfigError(
        f"learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}",
        expected,
        f"{found} in epoch {state.epoch + 1} step {step}",
        again + (" in a new --out" if job.state.exists() else "") + good,
    )


def _announce(job: Job, selection: Sequence[Sample], trainer: Trainer) -> None:
    dist, loader = trainer.dist, trainer.loader
    chosen = f"{len(selection):,} images of {job.recipe.select} choose the epoch"
    where = dist.device.type + (f", {dist.world_size} processes" if dist.world_size > 1 else "")
    pictures = f"read in every epoch (--workers {job.config.workers})"
    if loader.kept is not None:
        pictures = f"{loader.kept.nbytes / 1e6:,.0f} MB, kept on the device"
    print(
        f"{job.kind}: {job.spec.architecture} at {job.spec.input_size}x{job.spec.input_size} on "
        f"{len(loader.images):,} images of {job.dataset.name}, {where};\n"
        f"  {chosen if selection else 'the last epoch is kept'}; pictures: {pictures}",
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
