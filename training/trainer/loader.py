"""From images on disk to batches, reproducible picture by picture."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from efficientface_deploy.errors import ConfigError, DatasetError, EfficientFaceError, words_of
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.dataset import Dataset, Sample, image_list_hash
from training.trainer.augmentation import AUGMENTATIONS, Crop, Uniforms, uniforms
from training.trainer.config import Job
from training.trainer.distributed import Distributed
from training.trainer.inference import NetworkInput
from training.trainer.pictures import Pictures, common_side
from training.trainer.targets import dataset_targets

# The name of the tenth of train that chooses epochs, among the names of splits.
HOLDOUT = "holdout"

Keys = tuple[int, list[int]]  # of a batch: the view, and which images

_EPOCH_STRIDE = 1_000_003  # between the seeds of two epochs' orders


# ---- Which images


def choose_samples(job: Job, dist: Distributed) -> tuple[list[Sample], list[Sample]]:
    """The images to train on, and those that choose the epoch (none for ``last``).

    Raises:
        ConfigError: A class has no image to train on, or the ranks cannot share a batch.
        DatasetError: There is no such split, or it does not fill a batch.
    """
    dataset = job.dataset
    samples, selection = split_samples(dataset, job.recipe.select, job.config.seed)
    seen = {sample.label for sample in samples}
    if missing := [label for index, label in enumerate(dataset.labels) if index not in seen]:
        wanted, found = "training images of every class", "none of " + ", ".join(missing)
        fix = "add images, or prepare the data set with the classes that it has "
        fix += "(python -m training.prepare folders --classes ...)"
        raise ConfigError(dataset.root, wanted, found, fix)
    check_batches(len(samples), job.recipe.batch_size, dist.world_size)
    return samples, selection


def split_samples(dataset: Dataset, select: str, seed: int) -> tuple[list[Sample], list[Sample]]:
    """As :func:`choose_samples`, by the option ``select`` and the seed."""
    samples = list(dataset.split("train"))
    if select == HOLDOUT:
        return hold_out(samples, seed)
    return samples, [] if select == "last" else list(dataset.split(select))


def hold_out(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split off a seeded tenth of every class of the train split, for selection.

    At least one image of a class is held out, and never all.

    Returns:
        The rest and the held-out images, in the order given.
    """
    generator = np.random.default_rng(seed)
    labels = np.array([sample.label for sample in samples])
    held = np.zeros(len(samples), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(0.1 * len(members))), len(members) - 1)
        held[generator.choice(members, count, replace=False)] = True
    rest = [sample for sample, out in zip(samples, held, strict=True) if not out]
    return rest, [sample for sample, out in zip(samples, held, strict=True) if out]


def check_batches(length: int, batch_size: int, world_size: int) -> None:
    """Refuse batches that cannot be shared, or that these images do not fill.

    Raises:
        ConfigError: The ranks would have other numbers of images, or one each, on which batch norm
            has no statistics.
        DatasetError: There are too few images.
    """
    if batch_size % world_size or batch_size < 2 * world_size:
        wanted = f"a multiple of the {world_size} processes, with two images or more for each"
        raise ConfigError("--batch-size", wanted, str(batch_size), "change one of them")
    if length < batch_size:
        wanted = f"at least one batch of {batch_size} images"
        fix = "give a smaller --batch-size or more images"
        raise DatasetError("training split", wanted, f"{length} images", fix)


# ---- Views


class Batch(NamedTuple):
    """Views of N images, on one device, before their pixels are changed.

    Attributes:
        pixels: uint8 (N, H, W, 1 or 3).
        rows: float32 (N, P), what each picture's augmentation is.
        targets: float32 (N, C).
    """

    pixels: Tensor
    rows: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device; pinned memory is not waited for."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class TrainingImages(TorchDataset[Batch]):
    """Augmented images; a view is named by (seed, view, index) and depends on nothing else.

    Args:
        samples: N images.
        spec: The network's.
        augmentation: Name of the random change, of :data:`AUGMENTATIONS`.
        seed: Of the augmentation.
        votes: Take the votes as targets instead of the label.
        on_device: Whether to keep the pictures on the device, of :data:`ON_DEVICE`.

    Attributes:
        augment: What is done to the pixels of a batch.
        targets: float32 (V, N, C), of each view of each image; V is 1 for the data set's own.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        spec: ModelSpec,
        augmentation: str,
        seed: int,
        *,
        votes: bool = False,
        on_device: str = "auto",
    ) -> None:
        self.samples, self.spec = samples, spec
        self.augmentation, self.seed = augmentation, seed
        self.targets = dataset_targets(samples, spec.num_classes, votes=votes)[None]  # (1, N, C)
        self.augment = AUGMENTATIONS[augmentation]
        # Pictures of one moderate size are cropped in batches; others by who reads them.
        side = common_side(samples) if augmentation == "published" else None
        if native := side is not None and side <= 2 * spec.input_size:
            self.augment = Crop(side, spec.input_size)
        self.crops = augmentation == "published" and not native
        if self.crops and on_device == "yes":
            wanted = "pictures of one size, square and not far above --input-size, to crop from"
            fix = "leave it out, or choose another --augmentation"
            raise ConfigError("--data-on-device yes", wanted, "others", fix)
        self.pictures = Pictures(samples, spec, "no" if self.crops else on_device, native=native)
        self._hash: str | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, view: int, indices: Sequence[int]) -> Tensor:
        """What the augmentation of one view of some images is: float32 (N, P)."""
        numbers = uniforms(self.seed, view, np.asarray(indices))
        return torch.from_numpy(self.augment.parameters(numbers))

    def batch(self, view: int, indices: Sequence[int]) -> Batch:
        """One view of some images, read from their files.

        Raises:
            EfficientFaceError: One cannot be read, or has changed.
        """
        crops: Sequence[Uniforms | None] = [None] * len(indices)
        if self.crops:
            crops = np.split(uniforms(self.seed, view, np.asarray(indices)), len(indices))
        pixels = [
            self.pictures.read(index, crop) for index, crop in zip(indices, crops, strict=True)
        ]
        channels = max(picture.shape[2] for picture in pixels)
        stacked = np.stack([np.broadcast_to(p, (*p.shape[:2], channels)) for p in pixels])
        targets = torch.from_numpy(self.targets[view % len(self.targets), indices])  # (N, C)
        return Batch(torch.from_numpy(stacked), self.rows(view, indices), targets)

    def __getitems__(self, keys: Keys) -> Batch | EfficientFaceError:
        """A batch for a worker, or the error: what a worker raises arrives as a traceback."""
        try:
            batch = self.batch(*keys)
        except EfficientFaceError as error:
            return error
        if (worker := get_worker_info()) is not None:
            # Here, since torch does it in a thread, whose error would leave the training waiting.
            try:
                for part in batch:
                    part.share_memory_()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                return _no_workers(worker.num_workers, "room for their batches in /dev/shm", error)
        return batch

    def content_hash(self, root: Path) -> str:
        """Hash of the images' bytes and places below ``root``, in order; read once."""
        if self._hash is None:
            self._hash = image_list_hash(self.samples, root)
        return self._hash

    def labels_hash(self) -> str:
        """Hash of the images' labels and votes, in order."""
        said = [(sample.label, sample.votes) for sample in self.samples]
        return hashlib.sha256(repr(said).encode()).hexdigest()


class Renderer:
    """Makes a network's input of a batch, on a device.

    Args:
        images: Whose batches.
        device: Where they are.
    """

    def __init__(self, images: TrainingImages, device: torch.device) -> None:
        self.augment = images.augment
        self.input = NetworkInput(images.spec, device)

    def __call__(self, batch: Batch) -> Tensor:
        """float32 (N, 3, S, S), normalised, channels last."""
        return self.input.normalise(self.views(batch))

    def views(self, batch: Batch) -> Tensor:
        """The augmented pixels, float32 (N, C, S, S), 0 to 255."""
        return self.augment(self.input.values(batch.pixels), batch.rows, self.input.fill)


# ---- Batches


class BatchOrder(Sampler[Keys]):
    """One process's part of every batch of an epoch, known from the seed and the epoch alone.

    Every epoch has its own permutation. Of each batch, rank r of n takes every n-th image from
    the r-th on: the ranks' parts are disjoint and together are the batch of a single process.

    A last batch that is not full is left out: batch norm on two images would disturb the
    statistics. Every image comes in some epoch. The published code keeps it.

    Args:
        length: Number of images.
        batch_size: Images of one batch of all ranks together; a multiple of their number.
        seed: Of the permutations.
        views: Views of each image that are used in turn, one per epoch; 0 for a new one always.
        whole: Leave out a last batch that is not full; else it comes with as many images as all
            ranks have equally many of, two at least.
        rank: This process.
        world_size: How many processes there are.

    Attributes:
        epoch: Whose batches come next, set by the training loop.
        start: Batches of it that were done before, by a run that goes on.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        views: int = 0,
        whole: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_batches(length, batch_size, world_size)
        self.length, self.batch_size, self.seed, self.views = length, batch_size, seed, views
        self.rank, self.world_size = rank, world_size
        each = 0 if whole else length % batch_size // world_size
        self.rest = each * world_size if each > 1 else 0
        self.epoch = 0
        self.start = 0

    @property
    def steps(self) -> int:
        """Batches of a whole epoch."""
        return self.length // self.batch_size + bool(self.rest)

    @property
    def images(self) -> int:
        """Images of a whole epoch, over all ranks."""
        return self.length // self.batch_size * self.batch_size + self.rest

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[Keys]:
        generator = torch.Generator().manual_seed(self.seed + _EPOCH_STRIDE * self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()[: self.images]
        view = self.epoch % self.views if self.views else self.epoch
        for step in range(self.start, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield view, batch[self.rank :: self.world_size]


class TrainingLoader:
    """Batches on a device, of pictures that are kept there, or from workers. Close it at the end.

    Args:
        images: The images.
        batches: The keys of each batch; all of one iteration are of one view.
        workers: Processes that read images which are not kept.
        device: Where the batches go.
        processes: How many keep pictures in this machine's memory.

    Attributes:
        render: Makes a network's input of a batch.
        kept: The pictures where they are kept, uint8 (N, H, W, C).

    Raises:
        ConfigError: The pictures do not fit where they must be kept, or the workers' batches do not
            fit into shared memory.
    """

    def __init__(
        self,
        images: TrainingImages,
        batches: Iterable[Keys],
        workers: int,
        device: torch.device,
        processes: int = 1,
    ) -> None:
        self.images, self.batches, self.device = images, batches, device
        self.render = Renderer(images, device)
        self.kept = images.pictures.keep(device, processes)
        self._workers: DataLoader[Batch] | None = None
        if self.kept is None:
            _check_queues(workers)
            self._workers = DataLoader(
                images,
                batch_sampler=batches,  # type: ignore[arg-type]  # of views and indices
                num_workers=workers,
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # a whole batch comes
                worker_init_fn=_ignore_signals,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
            )

    def __iter__(self) -> Iterator[Batch]:
        """The batches, on the device.

        Raises:
            EfficientFaceError: An image cannot be read, or a worker has died.
        """
        return self._kept_batches() if self._workers is None else self._read_batches()

    def _kept_batches(self) -> Iterator[Batch]:
        assert self.kept is not None
        keys = list(self.batches)
        if not keys:
            return
        view, order = keys[0][0], [index for _, indices in keys for index in indices]
        targets = self.images.targets[view % len(self.images.targets), order]  # (n, C)
        # Once an epoch, so that no step waits for the CPU.
        parts = torch.tensor(order), self.images.rows(view, order), torch.from_numpy(targets)
        sizes = [len(indices) for _, indices in keys]
        splits = (torch.split(part.to(self.device), sizes) for part in parts)
        for indices, rows, own in zip(*splits, strict=True):
            yield Batch(self.kept[indices], rows, own)

    def _read_batches(self) -> Iterator[Batch]:
        assert self._workers is not None
        try:
            for batch in self._workers:
                if isinstance(batch, EfficientFaceError):
                    raise batch
                yield batch.to(self.device)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            wanted = "workers that live as long as the training"
            raise _no_workers(self._workers.num_workers, wanted, error) from None

    def close(self) -> None:
        """End the workers, which heed no signal; torch itself waits for the garbage collector."""
        if self._workers is not None and self._workers._iterator is not None:
            self._workers._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._workers._iterator = None


# Of a worker: two batches that wait and one that is made, of three tensors, each twice while it is
# handed over; and its connections.
_DESCRIPTORS = 24


def _as_it_is(batch: Batch | EfficientFaceError) -> Batch | EfficientFaceError:
    return batch


def _check_queues(workers: int) -> None:
    """Refuse workers that the system has no queues for; torch, half-way, would say much more.

    A worker that finds no descriptor for a batch would lose it, and the training wait for ever.

    Raises:
        ConfigError: There is no /dev/shm, or too few descriptors are left.
    """
    queues: list[Any] = []
    try:
        for _ in range(workers + 1 if workers else 0):
            queues.append(multiprocessing.Queue())
        with contextlib.ExitStack() as files:
            for _ in range(workers * _DESCRIPTORS // 2):
                for end in os.pipe():
                    files.callback(os.close, end)
    except OSError as error:
        raise _no_workers(workers, "queues to them, files for batches", error) from None
    finally:
        for queue in queues:
            queue.close()


def _no_workers(workers: int, wanted: str, error: Exception) -> ConfigError:
    fix = "add --workers 0, or give more memory (in Docker --shm-size too)"
    return ConfigError(f"--workers {workers}", wanted, words_of(error), fix)


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the training, which saves its state and then ends its workers.

    A terminal, a batch system or torchrun sends them to all processes of a group.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Python ends workers that are left by SIGTERM, which these ignore, and waits for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports a killed worker
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
