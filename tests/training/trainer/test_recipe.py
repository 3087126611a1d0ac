from __future__ import annotations

import numpy as np
import pytest
import torch

from efficientface_deploy.models import EfficientFace
from training.trainer.recipe import DEFAULT_STUDENT, DEFAULT_TEACHER, Recipe, published_student
from training.trainer.targets import LOSSES


def recipe(**changes) -> Recipe:
    return Recipe(
        **{
            "epochs": 10,
            "batch_size": 8,
            "learning_rate": 0.2,
            "weight_decay": 1e-4,
            "schedule": "one-cycle",
            "loss": "published",
            "augmentation": "published",
        }
        | changes
    )


def test_one_cycle():
    one_cycle = recipe()
    assert one_cycle.learning_rate_at(0) == pytest.approx(0.04 * 0.2)
    assert one_cycle.learning_rate_at(2) == pytest.approx(0.2)  # a fifth of ten epochs
    assert one_cycle.learning_rate_at(6) == pytest.approx(0.1)  # half of the cosine
    assert one_cycle.learning_rate_at(10) == pytest.approx(0, abs=1e-12)
    slopes = np.diff([one_cycle.learning_rate_at(step / 50) for step in range(501)])
    assert (slopes[:100] > 0).all() and (slopes[100:] < 0).all()
    assert abs(slopes).max() < 0.003  # no jump


def test_cosine():
    cosine = recipe(schedule="cosine")
    rates = [cosine.learning_rate_at(at) for at in (0, 2.5, 5, 10)]
    assert rates == pytest.approx([0.2, 0.1 * (1 + 0.5**0.5), 0.1, 0], abs=1e-12)


def test_steps():
    steps = recipe(schedule="step", step_epochs=3, decay=0.5)
    rates = [steps.learning_rate_at(at) for at in (0, 2.99, 3, 5.99, 6, 9.5)]
    assert rates == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05, 0.025])


def test_optimizer_is_sgd_over_all_parameters():
    model = EfficientFace(7)
    optimizer = recipe(nesterov=True).optimizer(model, torch.tensor(0.25))
    assert type(optimizer) is torch.optim.SGD and len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    settings = [group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")]
    assert settings == [0.25, 0.9, 1e-4, True]
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("default", [DEFAULT_STUDENT, DEFAULT_TEACHER])
def test_defaults_select_on_a_part_of_train(default):
    assert default.select == "holdout" and default.calibrate
    assert default.loss in LOSSES


# ---- The published recipe (facts.md) -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "epochs", "rates"),
    [
        ("rafdb", 100, {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 90: 0.0001}),
        ("affectnet7", 20, {0: 0.1, 4: 0.1, 5: 0.01, 10: 0.001, 19: 0.0001}),
        ("caers", 400, {0: 0.1, 49: 0.1, 50: 0.05, 100: 0.025, 399: 0.1 / 2**7}),
    ],
)
def test_published_schedule(name, epochs, rates):
    published = published_student(name)
    assert published.epochs == epochs
    assert {epoch: published.learning_rate_at(epoch) for epoch in rates} == pytest.approx(rates)


def test_published_recipe():
    published = published_student("rafdb")
    assert (published.batch_size, published.loss) == (128, "published")
    assert published.augmentation == "published"
    assert (published.select, published.ema, published.views) == ("test", 0, 0)
    assert (published.temperature, published.calibrate) == (1, False)
    group = published.optimizer(EfficientFace(7), torch.tensor(0.25)).param_groups[0]
    settings = [group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")]
    assert settings == [0.25, 0.9, 1e-4, False]
    assert published_student("ferplus") == published  # not published: RAF-DB's
