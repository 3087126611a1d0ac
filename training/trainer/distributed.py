"""Data parallel training: what ``torchrun`` starts, and what one process alone does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from efficientface_deploy.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that train together.

    Attributes:
        device: Where this process computes.
        rank: Its number; 0 prints and writes.
        size: How many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks after every backward pass."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # PyTorch 2.14 renamed the argument; older ones know only this name.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the first one's batch-norm statistics, before all judge the model."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, part: Any) -> list[Any]:
        """The objects of all ranks, in order, at every rank."""
        if self.size == 1:
            return [part]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part)
        return parts

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the ranks; every rank must ask."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(told)
        return [float(value) for value in told]

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Take part in what ``torchrun`` started; without it, be alone.

    Args:
        device: ``auto`` takes a GPU where there is one, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: ``cuda`` was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda", "a CUDA device", "none", "leave --device out")
    cuda = device != "cpu" and torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(torch.device("cuda" if cuda else "cpu"))
        return
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        own = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        yield Ranks(own, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
