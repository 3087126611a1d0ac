"""Random views of pictures, in batches, on any device.

A view is named by (seed, view, index) and by nothing else. Its random numbers are a formula of the
three; what they mean, a row of parameters, is computed in float64 on the CPU; the pixels follow
from the picture and its row, on a CPU and a GPU equal to rounding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from efficientface_deploy.vision.preprocess import LUMA, Float32Array

Uniforms = npt.NDArray[np.float64]  # (N, NUMBERS), in [0, 1)

NUMBERS = 24
_GOLDEN = 0x9E3779B97F4A7C15
_FLIP, _LEFT, _TOP, _TRIES = 0, 1, 2, 4  # columns of uniforms
_SMALLEST_CROP, _LONGEST_CROP = 0.08, 4 / 3  # torchvision's defaults: share of the area, sides


def uniforms(seed: int, view: int, indices: npt.NDArray[np.int64]) -> Uniforms:
    """The random numbers of a view of each picture.

    SplitMix64 (Steele et al. 2014) by its counter: any row can be had without the others.

    Args:
        seed: Of the training.
        view: Of the pictures.
        indices: N pictures.

    Returns:
        float64 (N, NUMBERS), 0 to 1, 1 excluded.
    """
    name = _mix(_mix(np.array([seed + 1], np.uint64)) + np.array([view + 1], np.uint64))
    columns = np.arange(1, NUMBERS + 1, dtype=np.uint64)
    counters = indices.astype(np.uint64)[:, None] * np.uint64(NUMBERS) + columns
    bits = _mix(name + counters * np.uint64(_GOLDEN))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Augmentation(Protocol):
    """A random change: what uniforms mean, and what that makes of pictures."""

    def parameters(self, numbers: Uniforms) -> Float32Array:
        """Rows (N, P) of uniforms (N, NUMBERS)."""

    def __call__(self, pixels: Tensor, parameters: Tensor, fill: Tensor) -> Tensor:
        """Views, float32 (N, C, S, S), 0 to 255.

        Args:
            pixels: float32 (N, C, H, W), 0 to 255; C is 1 or 3. S is H except in a crop.
            parameters: Rows (N, P) on the same device.
            fill: The mean colour (1, C, 1, 1), for what is not in the picture.
        """


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirror half of the pictures, for more of them than a short training sees often."""

    def parameters(self, numbers: Uniforms) -> Float32Array:
        """One column: whether to mirror."""
        return (numbers[:, :1] < 0.5).astype(np.float32)

    def __call__(self, pixels: Tensor, parameters: Tensor, fill: Tensor) -> Tensor:
        """Exact: no value changes."""
        return torch.where(parameters[:, :, None, None] > 0, pixels.flip(3), pixels)


@dataclasses.dataclass(frozen=True)
class Crop:
    """The published recipe's: random resized crop at torchvision's default scale, and flip.

    A resize is two matrix products, with the weights of Pillow's antialiased bilinear filter.

    Attributes:
        native: Side of the pictures as they are stored.
        side: Side of a view.
    """

    native: int
    side: int

    def parameters(self, numbers: Uniforms) -> Float32Array:
        """Left, top, width and height in pixels, and whether to mirror."""
        boxes = crop_boxes(numbers, self.native, self.native)
        return np.column_stack([boxes, numbers[:, _FLIP] < 0.5]).astype(np.float32)

    def __call__(self, pixels: Tensor, parameters: Tensor, fill: Tensor) -> Tensor:
        """The crops at the model's size."""
        left, top, width, height, flip = parameters.unbind(1)
        across = self._weights(left, width)  # (N, S, W)
        across = torch.where(flip[:, None, None] > 0, across.flip(1), across)
        down = self._weights(top, height)  # (N, S, H)
        return down[:, None] @ pixels @ across.transpose(1, 2)[:, None]

    def _weights(self, start: Tensor, length: Tensor) -> Tensor:
        """What each of ``native`` pixels gives to each of ``side``: (N, side, native)."""
        to = torch.arange(self.side, device=start.device) + 0.5
        at = torch.arange(self.native, device=start.device) + 0.5
        start, length = start[:, None, None], length[:, None, None]
        scale = length / self.side
        distance = (at - (start + to[:, None] * scale)).abs() / scale.clamp(min=1)
        weights = (1 - distance).clamp(min=0) * ((at >= start) & (at < start + length))
        return weights / weights.sum(dim=2, keepdim=True)


def crop_boxes(numbers: Uniforms, width: int, height: int) -> npt.NDArray[np.float64]:
    """Left, top, width and height (N, 4) of torchvision's RandomResizedCrop: ten tries for each."""
    area = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * numbers[:, _TRIES::2]  # (N, 10)
    ratio = np.exp(math.log(_LONGEST_CROP) * (2 * numbers[:, _TRIES + 1 :: 2] - 1))
    pixels = width * height * area
    sides = np.stack([np.rint(np.sqrt(pixels * ratio)), np.rint(np.sqrt(pixels / ratio))], axis=2)
    fits = np.all((sides >= 1) & (sides <= (width, height)), axis=2)  # (N, 10)
    chosen = sides[np.arange(len(sides)), fits.argmax(axis=1)]  # (N, 2)
    largest = [min(width, round(height * _LONGEST_CROP)), min(height, round(width * _LONGEST_CROP))]
    none = ~np.any(fits, axis=1)
    chosen[none] = largest
    free = (width, height) - chosen
    corner = np.floor(numbers[:, [_LEFT, _TOP]] * (free + 1))
    corner[none] = free[none] // 2
    return np.column_stack([corner, chosen])


def crop_randomly(image: Image.Image, numbers: Uniforms, side: int) -> Image.Image:
    """The same crop (N = 1) of a picture of any size, by Pillow; it is not mirrored."""
    left, top, width, height = crop_boxes(numbers, *image.size)[0]
    box = int(left), int(top), int(left + width), int(top + height)
    return image.crop(box).resize((side, side), Image.Resampling.BILINEAR)


@dataclasses.dataclass(frozen=True)
class Move:
    """Flip, turn, shift, scale, shear; then brightness and contrast; then perhaps a cover.

    Attributes:
        degrees: Largest turn either way.
        shift: Largest shift, as a share of the side.
        smallest: Smallest factor of the size.
        largest: Largest factor of the size.
        light: Largest change of brightness and of contrast.
        shear: Largest shear, degrees.
        cover: Random erasing (Zhong et al. 2020): in half of the pictures a rectangle of 2 to 25 %.
    """

    degrees: float
    shift: float
    smallest: float
    largest: float
    light: float
    shear: float = 0.0
    cover: bool = False

    def parameters(self, numbers: Uniforms) -> Float32Array:
        """The inverse affine matrix (6), brightness, contrast, their order, the covered box (4).

        Positions are relative: -1 to 1 in the matrix, 0 to 1 in the box.
        """
        u, symmetric = numbers.T, 2 * numbers.T - 1
        angle = np.radians(self.degrees * symmetric[1])
        tan = np.tan(np.radians(self.shear * symmetric[5]))
        scale = self.smallest + (self.largest - self.smallest) * u[4]
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        # torchvision's matrix for RandomAffine, around the centre; the flip comes before it.
        a, b, d, e = cos - sin * tan, cos * tan + sin, -sin, cos
        x, y = 2 * self.shift * symmetric[2], 2 * self.shift * symmetric[3]
        sign = np.where(u[_FLIP] < 0.5, -1, 1)
        matrix = [sign * a, sign * b, -sign * (a * x + b * y), d, e, -(d * x + e * y)]
        light = [1 + self.light * symmetric[6], 1 + self.light * symmetric[7], u[8] < 0.5]
        area, ratio = 0.02 + 0.23 * u[10], np.exp(math.log(3) * symmetric[11])
        there = u[9] >= 0.5 if self.cover else np.zeros(len(numbers), bool)
        width = there * np.minimum(np.sqrt(area * ratio), 1)
        height = there * np.minimum(np.sqrt(area / ratio), 1)
        left, top = u[12] * (1 - width), u[13] * (1 - height)
        box = [left, top, left + width, top + height]
        return np.column_stack([*matrix, *light, *box]).astype(np.float32)

    def __call__(self, pixels: Tensor, parameters: Tensor, fill: Tensor) -> Tensor:
        """The whole picture is moved, so all of it sees the model's pixels."""
        side = pixels.shape[2]
        at = (torch.arange(side, device=pixels.device) + 0.5) / side  # pixel centres, 0 to 1
        columns = parameters[:, :, None, None, None].unbind(1)  # each (N, 1, 1, 1)
        a, b, c, d, e, f, brightness, contrast, first, *box = columns
        x, y = 2 * at - 1, 2 * at[:, None] - 1
        grid = torch.stack((a * x + (b * y + c), d * x + (e * y + f)), dim=4)[:, 0]  # (N, S, S, 2)
        views = functional.grid_sample(pixels - fill, grid, align_corners=False).add_(fill)

        # value * factor + (1 - factor) * level: brightness about black, contrast about the mean.
        first = first > 0
        for factor, of_mean in (
            (torch.where(first, brightness, contrast), ~first),
            (torch.where(first, contrast, brightness), first),
        ):
            level = luminance(views.mean(dim=(2, 3), keepdim=True)) * of_mean
            views.mul_(factor).add_((1 - factor) * level).clamp_(0, 255)
        if self.cover:
            left, top, right, bottom = box
            across, down = (
                (at >= left) & (at < right),
                (at[:, None] >= top) & (at[:, None] < bottom),
            )
            views = torch.where(across & down, fill, views)
        return views


# The luminance table of JPEG (ITU-T T.81, annex K.1).
_JPEG = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_BEST_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Photograph(Move):
    """:class:`Move`, then what other cameras and files do to a face: focus, and JPEG.

    A third of the pictures is blurred, a third sharpened; half is compressed, each channel as JPEG
    compresses luminance. A coefficient that lies between two steps of JPEG may be rounded otherwise
    on another device, which moves a block of 8x8 by a few grey levels.

    Attributes:
        blur: Largest standard deviation of the Gaussian, as a share of the side.
        sharpen: Largest share of what a blur takes away that is added.
        quality: Smallest quality of JPEG, as libjpeg counts it, of 1 to 95.
    """

    blur: float = 0.0
    sharpen: float = 0.0
    quality: int = _BEST_QUALITY

    def parameters(self, numbers: Uniforms) -> Float32Array:
        """As :class:`Move`; then the Gaussian's width, the blurred share, and JPEG's factor."""
        u = numbers.T
        width = self.blur * (0.1 + 0.9 * u[15])
        share = np.select([u[14] < 1 / 3, u[14] < 2 / 3], [1.0, -self.sharpen * u[16]], 0.0)
        quality = self.quality + (_BEST_QUALITY - self.quality) * u[18]
        factor = np.where(quality < 50, 50 / quality, 2 - quality / 50)  # libjpeg's
        jpeg = np.where(u[17] < 0.5, factor, 0.0)
        columns = [super().parameters(numbers), width, share, jpeg]
        return np.column_stack(columns).astype(np.float32)

    def __call__(self, pixels: Tensor, parameters: Tensor, fill: Tensor) -> Tensor:
        """The moved pictures (N, C, S, S), out of focus and compressed; S is a multiple of 8."""
        views = super().__call__(pixels, parameters[:, :-3], fill)
        width, share, factor = parameters[:, -3:, None, None].unbind(1)  # each (N, 1, 1)
        views = views + share[:, None] * (blurred(views, width) - views)
        views = views.clamp(0, 255)
        factor = factor[:, None]
        return torch.where(factor > 0, compressed(views, factor).clamp(0, 255), views)


def blurred(pixels: Tensor, width: Tensor) -> Tensor:
    """(N, C, S, S) under Gaussians of these standard deviations (N, 1, 1), in shares of S."""
    side = pixels.shape[2]
    at = (torch.arange(side, device=pixels.device) + 0.5) / side
    weights = torch.exp(-0.5 * ((at - at[:, None]) / width.clamp(min=1e-3)).square())
    weights = (weights / weights.sum(dim=2, keepdim=True))[:, None]  # (N, 1, S, S)
    return weights @ pixels @ weights.transpose(2, 3)


def compressed(pixels: Tensor, factor: Tensor) -> Tensor:
    """(N, C, S, S) after JPEG, its table multiplied by (N, 1, 1, 1); colour is not subsampled."""
    side = pixels.shape[2]
    at = torch.arange(8, dtype=torch.float64)
    cosines = torch.cos(math.pi / 8 * (at + 0.5) * at[:, None]) / 2  # DCT-II, orthonormal
    cosines[0] /= math.sqrt(2)
    dct = torch.kron(torch.eye(side // 8), cosines.float()).to(pixels.device)  # (S, S)
    table = torch.tensor(_JPEG, dtype=torch.float32, device=pixels.device)
    steps = (table.repeat(side // 8, side // 8) * factor).round().clamp(1, 255)  # (N, 1, S, S)
    coefficients = dct @ (pixels - 128) @ dct.T
    kept: Tensor = (coefficients / steps).round() * steps  # (N, C, S, S)
    return dct.T @ kept @ dct + 128


def luminance(pixels: Tensor) -> Tensor:
    """(N, 1, H, W) of (N, C, H, W); grey stays what it is, bit for bit."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels[:, :1], pixels[:, 1:2], pixels[:, 2:]
    return green + LUMA[0] * (red - green) + LUMA[2] * (blue - green)


# By name; "published" mirrors alone where its crop has been made before, of pictures of any size.
AUGMENTATIONS: dict[str, Augmentation] = {
    "published": Flip(),
    "flip": Flip(),
    "mild": Move(degrees=15, shift=0.08, smallest=0.85, largest=1.15, light=0.3),
    "strong": Move(
        degrees=20, shift=0.1, smallest=0.75, largest=1.25, light=0.4, shear=8, cover=True
    ),
    "photo": Photograph(15, 0.1, 0.7, 1.25, 0.4, blur=0.02, sharpen=1.5, quality=20),
}
