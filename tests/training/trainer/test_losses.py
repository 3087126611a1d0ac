from __future__ import annotations

import numpy as np
import pytest
import torch

from training.trainer.targets import LOSSES, cross_entropy, published_loss

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
