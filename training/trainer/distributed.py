"""Data parallel training: what ``torchrun`` starts, and what one process alone does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from efficientface_deploy.errors import ConfigError, words_of


@dataclasses.dataclass(frozen=True)
class Distributed:
    """The processes that train together, as one of them sees them.

    Attributes:
        device: Where this process computes.
        rank: Its number; 0 prints and writes.
        world_size: How many there are.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks after every backward pass."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # PyTorch 2.14 renamed the argument; older ones know only this name.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every rank the main process's batch-norm statistics, before all evaluate."""
        if self.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def gather(self, part: Any) -> list[Any]:
        """The objects of all ranks, in order, at every rank."""
        if self.world_size == 1:
            return [part]
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, part)
        return parts

    def sum(self, *values: Any) -> list[Any]:
        """Each scalar summed over the ranks; every rank must call it. One alone waits for none."""
        if self.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def barrier(self) -> None:
        """Go on when every rank has come here."""
        if self.world_size > 1:
            torch.distributed.barrier()


@contextlib.contextmanager
def init(device: str) -> Iterator[Distributed]:
    """Take part in what ``torchrun`` started; without it, be alone.

    Args:
        device: ``auto`` takes a GPU where there is one, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: ``cuda`` was asked for and there is none, or the GPU cannot be used.
    """
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if cuda:
        _open_cuda(int(os.environ["LOCAL_RANK"]) if world_size > 1 else 0, device)
    if world_size == 1:
        yield Distributed(torch.device("cuda" if cuda else "cpu"))
        return
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        own = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        yield Distributed(own, torch.distributed.get_rank(), world_size)
    finally:
        torch.distributed.destroy_process_group()


def _open_cuda(number: int, asked: str) -> None:
    """Take a GPU and compute on it once: its driver may be too old, or PyTorch too new for it.

    Raises:
        ConfigError: It cannot be used; says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a GPU that this PyTorch was not built for
            torch.cuda.set_device(number)
            torch.ones(1, device="cuda").sin_().item()
    except (RuntimeError, AssertionError) as error:
        built = torch.version.cuda
        wanted = f"a GPU for PyTorch {torch.__version__}, built for " + (
            f"CUDA {built}" if built else "no CUDA"
        )
        fix = "give --device cpu, or install a driver and a PyTorch that fit it"
        raise ConfigError(f"--device {asked}", wanted, words_of(error), fix) from None
    # A convolution's fastest algorithm is looked for once, since all batches have one size.
    torch.backends.cudnn.benchmark = True
