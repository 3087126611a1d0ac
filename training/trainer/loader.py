"""From images on disk to batches, reproducible picture by picture."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from efficientface_deploy.errors import ConfigError, DatasetError, EfficientFaceError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import load_image, normalise, resize
from efficientface_deploy.workbench.dataset import Dataset, Sample, image_list_hash
from training.trainer.augmentation import AUGMENTATIONS
from training.trainer.config import Job
from training.trainer.distributed import Distributed
from training.trainer.targets import dataset_targets

# The name of the tenth of train that chooses epochs, among the names of splits.
HOLDOUT = "holdout"

Item = tuple[np.ndarray, np.ndarray]  # image uint8 (S, S, 3), target float32 (C,)
Batch = tuple[Tensor, Tensor]  # images float32 (N, 3, S, S), targets float32 (N, C)
Key = tuple[int, int]  # view and index of an image

# View 17 of image 5 must be the same picture in every run: two primes keep the seeds apart.
_VIEW_STRIDE, _INDEX_STRIDE = 1_000_003, 7_919


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


# ---- One image


def view_seed(seed: int, view: int, index: int) -> int:
    """Seed of the augmentation of one view of one image."""
    return seed + _VIEW_STRIDE * view + _INDEX_STRIDE * index


class TrainingImages(TorchDataset[Item]):
    """Augmented images; an item is named by (view, index) and depends on nothing else.

    Args:
        samples: N images.
        spec: The network's.
        augmentation: Name of the random change, of :data:`AUGMENTATIONS`.
        seed: Of the augmentation.
        votes: Take the votes as targets instead of the label.

    Attributes:
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
    ) -> None:
        self.samples = samples
        self.spec = spec
        self.augmentation = augmentation
        self.augment = AUGMENTATIONS[augmentation](spec)
        self.seed = seed
        self.targets = dataset_targets(samples, spec.num_classes, votes=votes)[None]  # (1, N, C)
        self._hash: str | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Item:
        """Image uint8 (S, S, 3) and target float32 (C,) of one view."""
        view, index = key
        image = load_image(self.samples[index].path)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed also visits the devices, which takes longer than the augmentation.
            torch.default_generator.manual_seed(view_seed(self.seed, view, index))
            image = self.augment(image)
        return resize(image, self.spec), self.targets[view % len(self.targets), index]

    def __getitems__(self, keys: Sequence[Key]) -> list[Item] | EfficientFaceError:
        """A batch for a loader, or the error: what a worker raises arrives as a traceback."""
        try:
            return [self[key] for key in keys]
        except EfficientFaceError as error:
            return error

    def collate(self, items: list[Item] | EfficientFaceError) -> Batch | EfficientFaceError:
        """Stack items into a normalised batch (N, 3, S, S) and targets (N, C)."""
        if isinstance(items, EfficientFaceError):
            return items
        images = np.stack([image for image, _ in items])  # (N, S, S, 3)
        targets = np.stack([target for _, target in items])  # (N, C)
        return torch.from_numpy(normalise(images, self.spec)), torch.from_numpy(targets)

    def content_hash(self, root: Path) -> str:
        """Hash of the images' bytes and places below ``root``, in order; read once."""
        if self._hash is None:
            self._hash = image_list_hash(self.samples, root)
        return self._hash


# ---- Batches


class BatchOrder(Sampler[list[Key]]):
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

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(self.seed + _VIEW_STRIDE * self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()[: self.images]
        view = self.epoch % self.views if self.views else self.epoch
        for step in range(self.start, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(view, index) for index in batch[self.rank :: self.world_size]]


class TrainingLoader(DataLoader[Batch]):
    """Batches of images named by (view, index). Close it at the end.

    Args:
        images: The images.
        batches: The keys of each batch.
        workers: Processes that load images; an error of theirs is raised here as what it is.
    """

    def __init__(self, images: TrainingImages, batches: Iterable[list[Key]], workers: int) -> None:
        super().__init__(
            images,  # type: ignore[arg-type]  # items are named by (view, index)
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=images.collate,
            worker_init_fn=_ignore_signals,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches.

        Raises:
            EfficientFaceError: An image cannot be read.
        """
        for batch in super().__iter__():
            if isinstance(batch, EfficientFaceError):
                raise batch
            yield batch

    def close(self) -> None:
        """End the workers, which heed no signal; torch itself waits for the garbage collector."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._iterator = None


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
