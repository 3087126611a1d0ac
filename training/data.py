"""Images and target distributions for training, reproducible picture by picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from efficientface_deploy.dataset import Sample, label_distributions
from efficientface_deploy.errors import DatasetError
from efficientface_deploy.preprocess import load_image, normalise, resize
from efficientface_deploy.spec import ModelSpec

Augmentation = Callable[[Image.Image], Image.Image]
Batch = tuple[Tensor, Tensor]

# View 17 of image 5 must be the same picture in every run: three primes keep the seeds apart.
_EPOCH_STRIDE, _INDEX_STRIDE = 1_000_003, 7_919


def published_augmentation(spec: ModelSpec) -> Augmentation:
    """The published recipe's: random resized crop at torchvision's default scale, and flip."""
    augmentation: Augmentation = transforms.Compose(
        [
            transforms.RandomResizedCrop(spec.input_size),
            transforms.RandomHorizontalFlip(),
        ]
    )
    return augmentation


def default_augmentation(spec: ModelSpec) -> Augmentation:
    """Milder: the whole face stays in the picture; small turns, shifts, sizes and light."""
    fill = [round(255 * mean) for mean in spec.mean]
    augmentation: Augmentation = transforms.Compose(
        [
            functools.partial(_at_model_size, spec=spec),
            transforms.RandomHorizontalFlip(),
            transforms.RandomAffine(
                degrees=15,
                translate=(0.08, 0.08),
                scale=(0.85, 1.15),
                interpolation=transforms.InterpolationMode.BILINEAR,
                fill=fill,
            ),
            transforms.ColorJitter(brightness=0.3, contrast=0.3),
        ]
    )
    return augmentation


def _at_model_size(image: Image.Image, spec: ModelSpec) -> Image.Image:
    """The runtime's own resize, so that turning and shifting see the model's pixels."""
    return Image.fromarray(resize(image, spec))


AUGMENTATIONS: dict[str, Callable[[ModelSpec], Augmentation]] = {
    "published": published_augmentation,
    "default": default_augmentation,
}


class TrainingImages(TorchDataset[tuple[np.ndarray, np.ndarray]]):
    """Augmented images; an item is named by (epoch, index) and depends on nothing else.

    Args:
        samples: The images.
        spec: The network's.
        augmentation: Random change of a PIL image.
        seed: Of the augmentation.
        votes: Take the votes as targets instead of the label.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        spec: ModelSpec,
        augmentation: Augmentation,
        seed: int,
        *,
        votes: bool = False,
    ) -> None:
        if votes and any(sample.votes is None for sample in samples):
            raise DatasetError(
                "--targets votes",
                expected="a data set with a column of votes for each class",
                found="one without",
                fix="choose --targets ldg or onehot",
            )
        self.samples = samples
        self.spec = spec
        self.augmentation = augmentation
        self.seed = seed
        plain = samples if votes else [Sample(sample.path, sample.label) for sample in samples]
        self.targets = label_distributions(plain, spec.num_classes)  # (N, C)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (S, S, 3) and target float32 (C,) of one view."""
        epoch, index = key
        image = load_image(self.samples[index].path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + _EPOCH_STRIDE * epoch + _INDEX_STRIDE * index)
            image = self.augmentation(image)
        return resize(image, self.spec), self.targets[index]

    def collate(self, items: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        """Stack items into a normalised batch (N, 3, S, S) and targets (N, C)."""
        images = np.stack([image for image, _ in items])  # (N, S, S, 3)
        targets = np.stack([target for _, target in items])  # (N, C)
        return torch.from_numpy(normalise(images, self.spec)), torch.from_numpy(targets)


class EpochSampler(Sampler[tuple[int, int]]):
    """A fresh permutation for each epoch, known from the seed and the epoch alone.

    Args:
        length: Number of images.
        seed: Of the permutations.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed + _EPOCH_STRIDE * self.epoch)
        for index in torch.randperm(self.length, generator=generator).tolist():
            yield self.epoch, index


def training_loader(
    images: TrainingImages, batch_size: int, seed: int, workers: int
) -> tuple[DataLoader[Batch], EpochSampler]:
    """A loader over whole batches, and the sampler whose ``epoch`` the loop sets.

    A last batch that is not full is left out: batch norm on two images would disturb the
    statistics. Every image comes in some epoch, since each epoch has its own order.
    """
    if len(images) < batch_size:
        raise DatasetError(
            "training split",
            expected=f"at least one batch of {batch_size} images",
            found=f"{len(images)} images",
            fix="give a smaller --batch-size or more images",
        )
    sampler = EpochSampler(len(images), seed)
    loader: DataLoader[Batch] = DataLoader(
        images,  # type: ignore[arg-type]  # items are named by (epoch, index)
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=images.collate,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return loader, sampler


def hold_out(
    samples: Sequence[Sample], seed: int, fraction: float = 0.1
) -> tuple[list[Sample], list[Sample]]:
    """Split off a seeded, stratified part of the training images for selection.

    Args:
        samples: The train split.
        seed: Of the choice.
        fraction: Part of every class that is held out: at least one image, never all.

    Returns:
        The rest and the held-out images, in the order given.
    """
    generator = np.random.default_rng(seed)
    labels = np.array([sample.label for sample in samples])
    held = np.zeros(len(samples), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held[generator.choice(members, count, replace=False)] = True
    rest = [sample for sample, out in zip(samples, held, strict=True) if not out]
    return rest, [sample for sample, out in zip(samples, held, strict=True) if out]
