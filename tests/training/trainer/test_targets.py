from __future__ import annotations

import torch

from training.trainer.targets import Blend, own_targets


def test_own_targets_are_left_as_they_are():
    targets = torch.rand(2, 7)
    assert own_targets(torch.zeros(2, 3, 32, 32), targets) is targets


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
