"""One step of a training: views, targets, forward, backward, SGD, moving average.

Nothing in it waits for the device, so that on a GPU it can be recorded once, as a CUDA graph, and
then be started as a whole: a small network's step is hundreds of short kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from efficientface_deploy.errors import words_of
from training.trainer.config import AMP, TrainConfig
from training.trainer.distributed import Distributed
from training.trainer.loader import Batch
from training.trainer.recipe import Recipe
from training.trainer.small_maps import use_matrix_products
from training.trainer.targets import LOSSES, TargetFunction

_WARM_UP = 3  # steps before a recording, in which libraries choose their algorithms


class TrainingStep:
    """The network and what changes with it in every step.

    Args:
        recipe: How it is trained.
        config: The command's options.
        model: The network, with its first weights.
        target_function: Gives the target distributions of a batch.
        render: Makes the network's input of a batch.
        dist: The processes that train together.

    Attributes:
        ema: Holds the moving average of weights and statistics, where the recipe wants one.
        graph: The recorded step, on a GPU.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: TrainConfig,
        model: nn.Module,
        target_function: TargetFunction,
        render: Callable[[Batch], Tensor],
        dist: Distributed,
    ) -> None:
        self.target_function, self.render, self.device = target_function, render, dist.device
        if config.sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.amp = AMP[config.amp]
        use_matrix_products(model, self.device, self.amp)
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(memory_format=self.format).to(self.device)
        self.dtype = next(self.model.parameters()).dtype
        self.decay, self.loss, self.size = recipe.ema, recipe.loss, recipe.batch_size
        # Numbers that change from step to step lie on the device, where a graph finds them.
        # float32 is what the fused SGD of CUDA takes.
        exact = torch.float64 if self.device.type == "cpu" else torch.float32
        self.rate, self.follow = torch.zeros(2, device=self.device, dtype=exact).unbind()
        self.optimizer = recipe.optimizer(self.model, self.rate)
        self.ema = AveragedModel(self.model, use_buffers=True) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.forward = dist.wrap(self.model)
        if config.compile:
            self.forward.compile()
        self.graph: RecordedStep | None = None
        self.recordable = self.device.type == "cuda"
        if self.recordable and (self.scaler.is_enabled() or dist.world_size > 1):
            self.recordable = False
            if dist.is_main_process:
                what = "--amp fp16" if self.scaler.is_enabled() else "several processes"
                print(f"note: with {what} a step is no CUDA graph, and takes longer", flush=True)

    @property
    def parts(self) -> dict[str, Any]:
        """What a state holds, by name."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts if self.ema is None else {**parts, "average": self.ema}

    def restored(self) -> None:
        """Take up what has been loaded into :attr:`parts`."""
        for group in self.optimizer.param_groups:
            group.update(lr=self.rate, fused=True, foreach=False)

    def __call__(self, batch: Batch, rate: float, done: int) -> Tensor:
        """Do one step.

        Args:
            batch: On the device.
            rate: The learning rate.
            done: Steps of the whole training that were done before.

        Returns:
            The loss, a scalar on the device, which the next step may overwrite.
        """
        self.rate.fill_(rate)
        # The average forgets faster at first, so that the first weights soon have no share.
        self.follow.fill_(1 - min(self.decay, (1 + done) / (10 + done)) if done else 1.0)
        if self.ema is not None:
            self.ema.n_averaged.fill_(done + 1)
        if self.recordable and len(batch.pixels) == self.size:  # an epoch's last may be smaller
            self.recordable = False
            self._record(batch)
        if self.graph is None or batch.pixels.shape != self.graph.batch.pixels.shape:
            return self.do(batch)
        return self.graph(batch)

    def do(self, batch: Batch) -> Tensor:
        """One step, operator by operator, at the rate that is set; its loss."""
        images = self.render(batch).to(self.dtype, memory_format=self.format)  # (N, 3, S, S)
        distribution = self.target_function(images, batch.targets.to(self.dtype))  # (N, C)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits = self.forward(images)  # (N, C)
        loss = LOSSES[self.loss](logits.to(self.dtype), distribution)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self._average(self.ema.module)
        return loss.detach()

    @torch.no_grad()
    def _average(self, average: nn.Module) -> None:
        """Follow weights and batch norm's statistics: average += follow * (them - average)."""
        ours, kept = list(_state(self.model)), list(_state(average))
        change = torch._foreach_sub(ours, kept)
        torch._foreach_mul_(change, self.follow.to(self.dtype))
        torch._foreach_add_(kept, change)

    def _record(self, batch: Batch) -> None:
        """Record the step as a graph and leave all as it was; or go on without, and say so."""
        momenta = {
            weight: state["momentum_buffer"].clone()
            for weight, state in self.optimizer.state.items()
            if state.get("momentum_buffer") is not None
        }
        changing = [*self.model.parameters(), *self.model.buffers()]
        changing += [] if self.ema is None else _state(self.ema.module)
        before = [tensor.clone() for tensor in changing]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                self.graph = RecordedStep(self.do, batch)
            except RuntimeError as error:  # also when memory does not hold a graph beside the rest
                print(f"note: a step is no CUDA graph here: {words_of(error)}", flush=True)
                self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)
            for weight, state in self.optimizer.state.items():
                if state.get("momentum_buffer") is not None:
                    # Zeros are what SGD begins with.
                    buffer = state["momentum_buffer"]
                    buffer.copy_(momenta.get(weight, torch.zeros_like(buffer)))


class RecordedStep:
    """A step as a CUDA graph.

    Args:
        step: From a batch to its loss, with nothing in it that waits for the device.
        batch: One of the size that all will have.

    Raises:
        RuntimeError: It cannot be recorded.
    """

    def __init__(self, step: Callable[[Batch], Tensor], batch: Batch) -> None:
        self.batch = Batch(*(part.clone() for part in batch))
        stream = torch.cuda.Stream(batch.pixels.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step(self.batch)

    def __call__(self, batch: Batch) -> Tensor:
        """Do the step on another batch; the loss is overwritten by the next."""
        for own, part in zip(self.batch, batch, strict=True):
            own.copy_(part)
        self.graph.replay()
        return self.loss


def _state(model: nn.Module) -> Iterator[Tensor]:
    """Weights and batch norm's statistics."""
    yield from model.parameters()
    yield from (buffer for buffer in model.buffers() if buffer.is_floating_point())
