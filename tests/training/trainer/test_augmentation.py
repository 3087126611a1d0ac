from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pillow

from training.trainer.augmentation import (
    AUGMENTATIONS,
    NUMBERS,
    Crop,
    Move,
    Photograph,
    crop_boxes,
    crop_randomly,
    luminance,
    uniforms,
)

SIDE = 48
FILL = torch.tensor([120.0, 100.0, 90.0]).view(1, 3, 1, 1)


def faces(count: int, side: int = SIDE, channels: int = 3) -> torch.Tensor:
    """Smooth pictures, float32 (N, C, S, S)."""
    coarse = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(255 * coarse, (side, side), mode="bicubic").clamp(0, 255)


def as_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy())


def as_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def rows(augmentation, numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(augmentation.parameters(numbers))


# ---- Random numbers


def test_uniforms_are_named_by_seed_view_and_index_alone():
    whole = uniforms(3, 2, np.arange(100))
    assert whole.shape == (100, NUMBERS) and whole.dtype == np.float64
    assert np.array_equal(uniforms(3, 2, np.array([70, 5])), whole[[70, 5]])
    others = (
        uniforms(4, 2, np.arange(100)),
        uniforms(3, 1, np.arange(100)),
        uniforms(2, 3, np.arange(100)),
    )
    for other in others:
        assert not np.isin(other, whole).any()


def test_uniforms_stay_the_same_for_ever():
    """What is stored of a view is worth nothing if a later version draws it otherwise."""
    digest = hashlib.sha256(uniforms(2**32 - 1, 400, np.arange(1000)).tobytes()).hexdigest()
    assert digest[:16] == "a52625b88a96ac47"


def test_uniforms_are_uniform_and_independent():
    u = np.concatenate(
        [uniforms(seed, view, np.arange(500)) for seed in (0, 1) for view in range(20)]
    )
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    assert np.abs(counts / counts.mean() - 1).max() < 0.02
    correlations = np.corrcoef(u, rowvar=False) - np.eye(NUMBERS)
    assert np.abs(correlations).max() < 0.04  # five standard errors
    assert np.abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.01


# ---- Against Pillow, picture by picture


@pytest.mark.parametrize("name", ["mild", "strong"])
def test_move_is_what_pillow_draws_from_the_same_numbers(name):
    """But for its rounding to whole grey levels and pixels: two levels of 255 on average."""
    move = AUGMENTATIONS[name]
    assert isinstance(move, Move)
    numbers, pixels = uniforms(0, 0, np.arange(40)), faces(40)
    numbers[:, 9] = 0  # not covered
    views = move(pixels, rows(move, numbers), FILL)
    fill = tuple(int(value) for value in FILL.flatten())
    differences = []
    for u, picture, view in zip(numbers, pixels, views, strict=True):
        image = as_image(picture.flip(2) if u[0] < 0.5 else picture)
        symmetric = 2 * u - 1
        shift = [float(move.shift * SIDE * value) for value in symmetric[2:4]]
        scale = move.smallest + (move.largest - move.smallest) * u[4]
        shear = [move.shear * symmetric[5], 0.0]
        angle, filtered = move.degrees * symmetric[1], InterpolationMode.BILINEAR
        image = pillow.affine(image, angle, shift, scale, shear, filtered, list(fill))
        steps = [
            lambda image, u=symmetric: pillow.adjust_brightness(image, 1 + move.light * u[6]),
            lambda image, u=symmetric: pillow.adjust_contrast(image, 1 + move.light * u[7]),
        ]
        for step in steps if u[8] < 0.5 else steps[::-1]:
            image = step(image)
        differences.append((as_pixels(image) - view).abs().mean())
    assert np.mean(differences) < 2 and np.max(differences) < 6


def test_move_of_nothing_changes_nothing():
    still = np.full((2, NUMBERS), 0.5)
    still[:, 9] = 0
    pixels = faces(2)
    move = Move(degrees=0, shift=0, smallest=1, largest=1, light=0)
    torch.testing.assert_close(move(pixels, rows(move, still), FILL), pixels, atol=1e-3, rtol=0)


def still(count: int) -> np.ndarray:
    """Numbers under which a picture stays where it is, and as it is."""
    numbers = np.full((count, NUMBERS), 0.5)
    numbers[:, 14], numbers[:, 17] = 0.9, 0.9
    return numbers


def photograph(**changes) -> Photograph:
    return Photograph(0, 0, 1, 1, 0, **{"blur": 0.05, "sharpen": 1.0, "quality": 20, **changes})


def test_photograph_of_nothing_changes_nothing():
    pixels, photo = faces(2), photograph()
    views = photo(pixels, rows(photo, still(2)), FILL)
    torch.testing.assert_close(views, pixels, atol=1e-3, rtol=0)


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])
def test_blur_is_a_gaussian(radius):
    """scipy's, away from the edge, where it repeats pixels and ours counts those that are there."""
    pixels, numbers, photo = faces(3), still(3), photograph(blur=radius / SIDE)
    numbers[:, 14], numbers[:, 15] = 0, 1
    views = photo(pixels, rows(photo, numbers), FILL)
    offsets = torch.arange(-12, 13)
    kernel = torch.exp(-0.5 * (offsets / radius) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    expected = torch.nn.functional.conv2d(pixels.flatten(0, 1)[:, None], kernel[None, None])
    inner = views[:, :, 12:-12, 12:-12]
    torch.testing.assert_close(inner, expected.view_as(inner), atol=0.01, rtol=0)


def test_sharpening_adds_what_a_blur_takes_away():
    pixels, numbers, photo = faces(2), still(2), photograph()
    numbers[:, 14], numbers[:, 16] = [0.1, 0.5], 1.0
    numbers[:, 15] = 0.3
    soft, _ = photo(pixels, rows(photo, numbers), FILL)
    numbers[:, 14] = [0.5, 0.5]
    sharp, _ = photo(pixels, rows(photo, numbers), FILL)
    expected = (2 * pixels[0] - soft).clamp(0, 255)
    torch.testing.assert_close(sharp, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("quality", [20, 45, 60, 90])
def test_compression_is_libjpegs(quality):
    """A grey picture through Pillow, but for its rounding of pixels: half a grey level."""
    pixels, numbers = faces(4, channels=1).round(), still(4)
    photo = photograph(quality=quality)
    numbers[:, 17], numbers[:, 18] = 0, 0
    views = photo(pixels, rows(photo, numbers), FILL[:, :1])
    for picture, view in zip(pixels, views, strict=True):
        file = io.BytesIO()
        Image.fromarray(picture[0].byte().numpy()).save(file, "JPEG", quality=quality)
        expected = torch.from_numpy(np.array(Image.open(file))).float()
        change = (expected - picture[0]).abs().mean()
        assert (view[0] - expected).abs().mean() < min(0.6, 0.8 * change + 0.1)


def test_photograph_leaves_a_part_as_it_is_and_changes_the_rest():
    photo = photograph()
    numbers = uniforms(0, 0, np.arange(3000))
    width, share, factor = photo.parameters(numbers)[:, -3:].T
    assert abs(np.mean(share == 0) - 1 / 3) < 0.03 and abs(np.mean(share == 1) - 1 / 3) < 0.03
    assert share.min() >= -1 and width.min() > 0 and width.max() <= 0.05
    assert abs(np.mean(factor == 0) - 0.5) < 0.03 and factor.max() <= 2.5


@pytest.mark.parametrize("native", [30, 48, 90])
def test_crop_is_pillows_crop_and_resize(native):
    """Enlarged and shrunk, mirrored and not, within a grey level or two of its rounding."""
    crop, pixels = Crop(native, SIDE), faces(40, native)
    numbers = uniforms(1, 0, np.arange(40))
    views = crop(pixels.round(), rows(crop, numbers), FILL)
    assert views.shape == (40, 3, SIDE, SIDE)
    for index, view in enumerate(views):
        image = crop_randomly(as_image(pixels[index]), numbers[index : index + 1], SIDE)
        expected = as_pixels(image)
        expected = expected.flip(2) if numbers[index, 0] < 0.5 else expected
        assert (view - expected).abs().max() < 2


def test_crops_are_drawn_as_torchvision_draws_them():
    """Its scale and sides, in shares of their area and of their corners, over many crops."""
    boxes = crop_boxes(uniforms(0, 0, np.arange(4000)), 120, 80)
    torch.manual_seed(0)
    image, reference = Image.new("RGB", (120, 80)), transforms.RandomResizedCrop(8)
    theirs = [reference.get_params(image, reference.scale, reference.ratio) for _ in range(4000)]
    top, left, height, width = np.array(theirs).T
    ours = boxes[:, 0] / 120, boxes[:, 1] / 80, boxes[:, 2] / 120, boxes[:, 3] / 80
    for own, other in zip(ours, (left / 120, top / 80, width / 120, height / 80), strict=True):
        shares = [0.1, 0.25, 0.5, 0.75, 0.9]
        np.testing.assert_allclose(np.quantile(own, shares), np.quantile(other, shares), atol=0.02)
    assert (boxes[:, 0] + boxes[:, 2] <= 120).all() and (boxes[:, 1] + boxes[:, 3] <= 80).all()
    assert (boxes[:, 2:] >= 1).all()


@pytest.mark.parametrize("size", [(200, 10), (10, 200), (1, 1)])
def test_crop_of_an_odd_picture_lies_in_it(size):
    boxes = crop_boxes(uniforms(0, 0, np.arange(300)), *size)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()


# ---- What each does


def test_flip_changes_nothing_else():
    flip, pixels = AUGMENTATIONS["flip"], faces(40)
    views = flip(pixels, rows(flip, uniforms(0, 0, np.arange(40))), FILL)
    flipped = [torch.equal(view, own.flip(2)) for view, own in zip(views, pixels, strict=True)]
    same = [torch.equal(view, own) for view, own in zip(views, pixels, strict=True)]
    assert [not value for value in same] == flipped and 10 < sum(flipped) < 30


def test_covered_part():
    """About half of the strong views have a rectangle of the mean colour; the rest is the face."""
    pixels = torch.full((300, 1, 60, 60), 7.0)
    strong = Move(degrees=0, shift=0, smallest=1, largest=1, light=0, cover=True)
    fill = torch.full((1, 1, 1, 1), 120.0)
    views = strong(pixels, rows(strong, uniforms(0, 0, np.arange(300))), fill)
    covered = views[:, 0] == 120
    areas = covered.float().mean(dim=(1, 2)).numpy()
    for mask in covered:  # one rectangle
        assert mask.sum() == mask.any(dim=0).sum() * mask.any(dim=1).sum()
    torch.testing.assert_close(
        views[~covered[:, None]], pixels[~covered[:, None]], atol=1e-3, rtol=0
    )
    assert 0.4 < (areas > 0).mean() < 0.6
    assert 0.015 < areas[areas > 0].min() < 0.05 and 0.2 < areas.max() < 0.27


@pytest.mark.parametrize("name", ["flip", "mild", "strong"])
def test_grey_needs_one_channel(name):
    """What three equal channels give, one gives; luminance leaves grey alone, bit for bit."""
    augment, grey = AUGMENTATIONS[name], faces(20, channels=1).round()
    assert torch.equal(luminance(grey.expand(-1, 3, -1, -1)), grey)
    row, fill = rows(augment, uniforms(0, 0, np.arange(20))), FILL[:, :1]
    one = augment(grey, row, fill)
    three = augment(grey.repeat(1, 3, 1, 1), row, fill.expand(-1, 3, -1, -1))
    torch.testing.assert_close(three, one.expand(-1, 3, -1, -1), atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("augment", [*AUGMENTATIONS.values(), Crop(SIDE, 64)])
def test_a_gpu_draws_the_same(augment):
    pixels, row = faces(64), rows(augment, uniforms(0, 0, np.arange(64)))
    ours = augment(pixels, row, FILL)
    theirs = augment(pixels.cuda(), row.cuda(), FILL.cuda()).cpu()
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0)
