"""The pictures of a data set as uint8: all kept on the device, or read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.errors import ConfigError, DatasetError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import FORMATS, UInt8Array, load_image, resize
from efficientface_deploy.workbench.dataset import Sample
from efficientface_deploy.workbench.environment import available_memory_bytes
from efficientface_deploy.workbench.progress import track
from training.trainer.augmentation import Uniforms, crop_randomly

ON_DEVICE = ("auto", "yes", "no")
_AUTO_SHARE = {"cuda": 0.5, "cpu": 0.25}  # of the free memory
_CHUNK = 64  # pictures that a thread reads at a time


class Pictures:
    """The pictures of N samples at the model's size, by the runtime's own resize.

    Grey ones have one channel where the network sees grey alone: a third of the work.

    Args:
        samples: The N samples.
        spec: The network's.
        on_device: Of :data:`ON_DEVICE`: whether to keep all of them on the device; ``auto`` does
            where they take at most half of a GPU's free memory, or a quarter of the machine's.
        native: Leave them at the size that all of them have.
    """

    def __init__(
        self, samples: Sequence[Sample], spec: ModelSpec, on_device: str, *, native: bool = False
    ) -> None:
        self.samples, self.spec = samples, spec
        self.on_device, self.native = on_device, native
        self._stamps = [_stamp(sample.path) for sample in samples]
        self._kept: dict[torch.device, Tensor | None] = {}

    def read(self, index: int, crop: Uniforms | None = None) -> UInt8Array:
        """One picture, uint8 (H, W, 1 or 3).

        Args:
            index: Which.
            crop: A row of uniforms, (1, NUMBERS): a random crop of it instead of all of it.

        Raises:
            DatasetError: The file has changed since the run began.
            ImageError: It cannot be read.
        """
        path = self.samples[index].path
        image = load_image(path)
        if (before := self._stamps[index]) is not None and _stamp(path) != before:
            fix = "put it back, or start again in a new --out"
            raise DatasetError(path, "the image as the run began", "one that has changed", fix)
        if crop is not None:
            image = crop_randomly(image, crop, self.spec.input_size)
        pixels = np.array(image) if self.native else resize(image, self.spec)  # (H, W, 3)
        grey = self.spec.colour == "grey" and (pixels == pixels[..., :1]).all()
        return pixels[..., :1] if grey else pixels

    def keep(self, device: torch.device, processes: int = 1) -> Tensor | None:
        """All of them on a device, uint8 (N, H, W, C), read once; None where they do not fit.

        Args:
            device: The device.
            processes: How many keep them in this machine's memory.

        Raises:
            ConfigError: They do not fit, and ``on_device`` is ``yes``.
        """
        if device not in self._kept:
            self._kept[device] = self._keep(device, processes) if self.samples else None
        return self._kept[device]

    def _keep(self, device: torch.device, processes: int) -> Tensor | None:
        if self.on_device == "no":
            return None
        shape = len(self.samples), *self.read(0).shape
        if not self._fits(shape, device, processes):
            return None
        pixels, coloured = self._read_all(shape)
        if coloured:  # the first was grey, others are not
            shape = *shape[:3], 3
            if not self._fits(shape, device, processes):
                return None
            pixels, _ = self._read_all(shape)
        return torch.from_numpy(pixels).to(device)

    def _fits(self, shape: tuple[int, ...], device: torch.device, processes: int) -> bool:
        needed, free = int(np.prod(shape)), free_bytes(device)
        if device.type == "cpu":
            free //= processes
        if self.on_device == "yes" and needed > free:
            wanted = f"{needed:,} bytes of free memory for {shape[0]:,} pictures on {device.type}"
            fix = "leave it out: they are then read in every epoch"
            raise ConfigError("--data-on-device yes", wanted, f"{free:,} bytes", fix)
        return self.on_device == "yes" or needed <= _AUTO_SHARE[device.type] * free

    def _read_all(self, shape: tuple[int, ...]) -> tuple[UInt8Array, bool]:
        """All pictures, and whether one has colours for which there is no room."""
        pixels, coloured = np.empty(shape, np.uint8), []

        def read(start: int) -> None:
            for index in range(start, min(start + _CHUNK, len(self.samples))):
                picture = self.read(index)
                if picture.shape[2] > shape[3]:
                    coloured.append(index)
                    return
                pixels[index] = picture  # one channel fills three

        starts = range(0, len(self.samples), _CHUNK)
        pool = ThreadPoolExecutor(usable_cpus())
        try:
            for _ in track(pool.map(read, starts), "reading the pictures", len(starts)):
                if coloured:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
        return pixels, bool(coloured)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes() or 0


def common_side(samples: Sequence[Sample]) -> int | None:
    """The side of the pictures, where all are squares of one size; by their headers alone."""
    sides: set[int] = set()
    for sample in samples:
        try:
            with Image.open(sample.path, formats=FORMATS) as image:
                sides |= set(image.size)
        except Exception:  # noqa: BLE001 - whoever reads it will say what is wrong with it
            return None
        if len(sides) > 1:
            return None
    return next(iter(sides), None)


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file does; None where there is none, as reading it will say."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
