"""Random views of a picture; the only user of torchvision in training."""

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
    crop = transforms.RandomResizedCrop(spec.input_size)
    augmentation: Augmentation = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
    return augmentation


def flip_augmentation(spec: ModelSpec) -> Augmentation:
    """Flip alone, for more pictures than a short training sees often."""
    flip = transforms.RandomHorizontalFlip()
    augmentation: Augmentation = transforms.Compose(
        [functools.partial(_at_model_size, spec=spec), flip]
    )
    return augmentation


def mild_augmentation(spec: ModelSpec) -> Augmentation:
    """The whole face stays in the picture; small turns, shifts, sizes and light."""
    return _moved(spec, degrees=15, shift=0.08, scale=(0.85, 1.15), shear=None, light=0.3)


def strong_augmentation(spec: ModelSpec) -> Augmentation:
    """Wider turns, shifts, sizes and light, and in half of the pictures a part is covered."""
    moved = _moved(spec, degrees=20, shift=0.1, scale=(0.75, 1.25), shear=8, light=0.4)
    covered = functools.partial(cover_a_part, colour=_mean_colour(spec))
    augmentation: Augmentation = transforms.Compose([moved, covered])
    return augmentation


AUGMENTATIONS: dict[str, Callable[[ModelSpec], Augmentation]] = {
    "published": published_augmentation,
    "flip": flip_augmentation,
    "mild": mild_augmentation,
    "strong": strong_augmentation,
}


def _moved(
    spec: ModelSpec,
    degrees: float,
    shift: float,
    scale: tuple[float, float],
    shear: float | None,
    light: float,
) -> Augmentation:
    """Flip, turn, shift (a share of the side), scale, shear (degrees); then brightness, contrast.

    The picture is resized first, so that all of it sees the model's pixels.
    """
    affine = transforms.RandomAffine(
        degrees,
        translate=(shift, shift),
        scale=scale,
        shear=shear,
        interpolation=transforms.InterpolationMode.BILINEAR,
        fill=_mean_colour(spec),
    )
    augmentation: Augmentation = transforms.Compose(
        [
            functools.partial(_at_model_size, spec=spec),
            transforms.RandomHorizontalFlip(),
            affine,
            transforms.ColorJitter(brightness=light, contrast=light),
        ]
    )
    return augmentation


def _at_model_size(image: Image.Image, spec: ModelSpec) -> Image.Image:
    """The runtime's own resize."""
    return Image.fromarray(resize(image, spec))


def _mean_colour(spec: ModelSpec) -> tuple[int, int, int]:
    red, green, blue = (round(255 * mean) for mean in spec.mean)
    return red, green, blue


def cover_a_part(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
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
