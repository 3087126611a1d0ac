from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from efficientface_deploy.errors import CheckpointError
from efficientface_deploy.models import load_checkpoint, save_checkpoint
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_deploy.vision.preprocess import normalise
from training.trainer.targets import (
    LOSSES,
    Blend,
    Ensemble,
    Teacher,
    cross_entropy,
    loaded_targets,
    published_loss,
)

CPU = torch.device("cpu")


def test_loaded_targets_are_left_as_they_are():
    targets = torch.rand(2, 7)
    assert loaded_targets(torch.zeros(2, 3, 32, 32), targets) is targets


def test_temperature_is_that_of_the_logits():
    logits = torch.randn(5, 7)
    softened = Blend(temperature=3)(logits.softmax(dim=1), torch.zeros(5, 7))
    torch.testing.assert_close(softened, (logits / 3).softmax(dim=1))


def test_share():
    distribution, own = torch.rand(4, 7).softmax(dim=1), torch.eye(7)[:4]
    blended = Blend(ldg_share=0.3)(distribution, own)
    torch.testing.assert_close(blended, 0.3 * distribution + 0.7 * own)
    torch.testing.assert_close(blended.sum(dim=1), torch.ones(4))
    assert Blend()(distribution, own) is distribution  # as published: nothing is touched


def test_low_temperature_leaves_the_largest():
    """The powers themselves would all be zero."""
    distribution = torch.tensor([[0.3, 0.4, 0.3], [0.0, 0.1, 0.9]])
    blended = Blend(0.005)(distribution, distribution)
    torch.testing.assert_close(blended, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


# ---- The LDG -----------------------------------------------------------------


@pytest.fixture
def photos() -> np.ndarray:
    """uint8 (4, 64, 64, 3)"""
    return np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)


def as_batch(images: np.ndarray, spec: ModelSpec) -> torch.Tensor:
    return torch.from_numpy(normalise(images, spec))


def test_same_size_and_normalisation_is_the_network_itself(save_ldg, ldg, spec, photos):
    teacher = Teacher(save_ldg(), None, spec, CPU)
    batch = as_batch(photos, spec)
    with torch.no_grad():
        expected = ldg(batch).softmax(dim=1)
    found = teacher(batch)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and not teacher.model.training
    assert found.std(dim=0).max() > 0.01  # the images are told apart


@pytest.mark.parametrize("size", [64, 96, 48])
def test_other_size_and_normalisation_are_converted(size, save_ldg, ldg, spec, photos):
    own = {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.25, 0.3), "input_size": size}
    teacher = Teacher(save_ldg_at(save_ldg, **own), None, spec, CPU)
    found = teacher(as_batch(photos, spec))

    mean, std = (torch.tensor(own[name])[:, None, None] for name in ("mean", "std"))
    pixels = torch.from_numpy(photos).permute(0, 3, 1, 2) / 255
    if size != 64:
        pixels = torch.nn.functional.interpolate(
            pixels, (size, size), mode="bilinear", antialias=True, align_corners=False
        )
    with torch.no_grad():
        expected = ldg((pixels - mean) / std).softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def save_ldg_at(save_ldg, input_size: int, **changes) -> Path:
    path = save_ldg(**changes)
    model, spec = load_checkpoint(path)
    save_checkpoint(path, model, spec.replace(input_size=input_size))
    return path


def test_teacher_of_other_labels(save_ldg, spec):
    labels = preset("rafdb").labels
    path = save_ldg(labels=(labels[1], labels[0], *labels[2:]))
    with pytest.raises(
        CheckpointError, match=r"expected labels Neutral, Happiness, .* found Happiness, Neutral, "
    ):
        Teacher(path, None, spec, CPU)


def test_teacher_of_another_colour(save_ldg, spec):
    with pytest.raises(
        CheckpointError, match="expected colour rgb, as the student sees, found grey"
    ):
        Teacher(save_ldg(colour="grey"), None, spec, CPU)


def test_student_as_teacher(student_file, spec, photos):
    """Any trained network may teach, and be one of several that do."""
    assert Teacher(student_file, None, spec, CPU)(as_batch(photos, spec)).shape == (4, 7)


def test_several_teachers_are_their_mean(save_ldg, student_file, spec, photos):
    batch = as_batch(photos, spec)
    first, second = (Teacher(path, None, spec, CPU) for path in (save_ldg(), student_file))
    torch.testing.assert_close(Ensemble([first, second])(batch), (first(batch) + second(batch)) / 2)
    assert torch.equal(Ensemble([first])(batch), first(batch))  # as published: nothing is touched
    assert not torch.allclose(first(batch), second(batch), atol=0.01)


def test_mirrored_pictures(save_ldg, spec, photos):
    batch, teacher = as_batch(photos, spec), Teacher(save_ldg(), None, spec, CPU)
    both = Ensemble([teacher], flips=True)
    torch.testing.assert_close(both(batch), (teacher(batch) + teacher(batch.flip(-1))) / 2)
    torch.testing.assert_close(both(batch), both(batch.flip(-1)))
    digests = {Ensemble([teacher] * n, flips=f).digest for n in (1, 2) for f in (False, True)}
    assert len(digests) == 4  # a store of one is refused for another


def test_published_ldg_needs_a_preset(ldg, spec, tmp_path):
    path = tmp_path / "ldg.pth.tar"
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in ldg.backbone.state_dict().items()}}, path
    )
    with pytest.raises(
        CheckpointError, match="say with --preset what a published checkpoint was trained on"
    ):
        Teacher(path, None, spec, CPU)
    assert Teacher(path, "rafdb", spec, CPU).side == 224


# ---- Losses --------------------------------------------------------------------------------------

N, C = 5, 7


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(N, C, generator=generator, dtype=torch.float64)


@pytest.fixture
def distribution() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(N, C, generator=generator, dtype=torch.float64).softmax(dim=1)


def terms(logits: torch.Tensor, distribution: torch.Tensor) -> np.ndarray:
    """-p log q of every image and class, (N, C), without PyTorch."""
    z = logits.detach().numpy()
    q = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return -distribution.numpy() * np.log(q)


def test_cross_entropy_is_the_mean_over_images_of_the_sum_over_classes(logits, distribution):
    expected = terms(logits, distribution).sum(axis=1).mean()
    assert cross_entropy(logits, distribution).item() == pytest.approx(expected, rel=1e-12)


def test_published_loss_is_the_mean_over_images_and_classes(logits, distribution):
    expected = terms(logits, distribution).mean()
    assert published_loss(logits, distribution).item() == pytest.approx(expected, rel=1e-12)


def test_one_hot_targets_give_ordinary_cross_entropy(logits):
    labels = torch.tensor([0, 6, 3, 3, 1])
    one_hot = torch.nn.functional.one_hot(labels, C).double()
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(cross_entropy(logits, one_hot), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "divisor"), [("cross-entropy", N), ("published", N * C)])
def test_gradient_is_the_difference_of_the_distributions(name, divisor, logits, distribution):
    # d/dz of -sum p log softmax(z) is softmax(z) - p, whatever p is, if its rows sum to one.
    logits.requires_grad_()
    LOSSES[name](logits, distribution).backward()
    expected = (logits.detach().softmax(dim=1) - distribution) / divisor
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_large_logits_stay_finite(name):
    loss = LOSSES[name](torch.tensor([[1e4, -1e4, 0.0]]), torch.full((1, 3), 1 / 3))
    assert torch.isfinite(loss)
