from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from efficientface_deploy.spec import ModelSpec, preset
from training.trainer.augmentation import AUGMENTATIONS, cover_a_part


@pytest.fixture
def spec() -> ModelSpec:
    return preset("rafdb").replace(input_size=32)


def test_published_augmentation_is_torchvisions_default_crop_and_flip(spec):
    crop, flip = AUGMENTATIONS["published"](spec).transforms
    assert (crop.scale, crop.ratio, crop.size) == ((0.08, 1.0), (3 / 4, 4 / 3), (32, 32))
    assert type(flip).__name__ == "RandomHorizontalFlip" and flip.p == 0.5


def test_flip_changes_nothing_else(spec):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    augment = AUGMENTATIONS["flip"](spec)
    flipped = []
    for number in range(40):
        torch.manual_seed(number)
        found = np.asarray(augment(Image.fromarray(pixels)))
        flipped.append(np.array_equal(found, pixels[:, ::-1]))
        assert flipped[-1] or np.array_equal(found, pixels)
    assert 10 < sum(flipped) < 30
    assert augment(Image.new("RGB", (50, 70))).size == (32, 32)


def test_covered_part(spec):
    """About half of the strong views have a rectangle of the mean colour; the rest is the face."""
    mean = tuple(round(255 * value) for value in spec.mean)
    areas = []
    for number in range(300):
        torch.manual_seed(number)
        image = Image.new("RGB", (60, 60), (1, 2, 3))
        covered = np.all(np.array(cover_a_part(image, mean)) == mean, axis=2)
        areas.append(covered.mean())
        rows, columns = covered.any(axis=1).sum(), covered.any(axis=0).sum()
        assert covered.sum() == rows * columns  # one rectangle
    areas = np.array(areas)
    assert 0.4 < (areas > 0).mean() < 0.6
    assert 0.015 < areas[areas > 0].min() < 0.05 and 0.2 < areas.max() < 0.27
