"""Random views of a picture."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from PIL import Image
from torchvision import transforms

from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import resize

Augmentation = Callable[[Image.Image], Image.Image]


def published_augmentation(spec: ModelSpec) -> Augmentation:
    """The published recipe's: random resized crop at torchvision's default scale, and flip."""
    augmentation: Augmentation = transforms.Compose(
        [
            transforms.RandomResizedCrop(spec.input_size),
            transforms.RandomHorizontalFlip(),
        ]
    )
    return augmentation


def mild_augmentation(spec: ModelSpec) -> Augmentation:
    """The whole face stays in the picture; small turns, shifts, sizes and light."""
    augmentation: Augmentation = transforms.Compose(
        [
            functools.partial(_at_model_size, spec=spec),
            transforms.RandomHorizontalFlip(),
            transforms.RandomAffine(
                degrees=15,
                translate=(0.08, 0.08),
                scale=(0.85, 1.15),
                interpolation=transforms.InterpolationMode.BILINEAR,
                fill=_mean_colour(spec),
            ),
            transforms.ColorJitter(brightness=0.3, contrast=0.3),
        ]
    )
    return augmentation


def strong_augmentation(spec: ModelSpec) -> Augmentation:
    """Wider turns, shifts, sizes and light, and in half of the pictures a part is covered."""
    augmentation: Augmentation = transforms.Compose(
        [
            functools.partial(_at_model_size, spec=spec),
            transforms.RandomHorizontalFlip(),
            transforms.RandomAffine(
                degrees=20,
                translate=(0.1, 0.1),
                scale=(0.75, 1.25),
                shear=8,
                interpolation=transforms.InterpolationMode.BILINEAR,
                fill=_mean_colour(spec),
            ),
            transforms.ColorJitter(brightness=0.4, contrast=0.4),
            functools.partial(_cover_a_part, colour=_mean_colour(spec)),
        ]
    )
    return augmentation


def _mean_colour(spec: ModelSpec) -> tuple[int, int, int]:
    red, green, blue = (round(255 * mean) for mean in spec.mean)
    return red, green, blue


def _cover_a_part(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Random erasing (Zhong et al. 2020): in half of the pictures a rectangle of 2 to 25 %."""
    chance, area, ratio, left, top = torch.rand(5).tolist()
    if chance < 0.5:
        return image
    area, ratio = 0.02 + 0.23 * area, math.exp(math.log(3) * (2 * ratio - 1))
    width = min(round(image.width * math.sqrt(area * ratio)), image.width)
    height = min(round(image.height * math.sqrt(area / ratio)), image.height)
    corner = round(left * (image.width - width)), round(top * (image.height - height))
    image.paste(colour, (*corner, corner[0] + width, corner[1] + height))
    return image


def _at_model_size(image: Image.Image, spec: ModelSpec) -> Image.Image:
    """The runtime's own resize, so that turning and shifting see the model's pixels."""
    return Image.fromarray(resize(image, spec))


AUGMENTATIONS: dict[str, Callable[[ModelSpec], Augmentation]] = {
    "published": published_augmentation,
    "mild": mild_augmentation,
    "strong": strong_augmentation,
}
