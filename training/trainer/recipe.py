"""How a network is trained: the published recipe, and the ones that we measured to be better."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

SELECTIONS = ("holdout", "validation", "test", "last")
SCHEDULES = ("one-cycle", "cosine", "step")

# The public code's settings: epochs, epochs between steps, factor of a step.
PUBLISHED_SCHEDULES = {
    "rafdb": (100, 30, 0.1),
    "affectnet7": (20, 5, 0.1),
    "affectnet8": (20, 5, 0.1),
    "caers": (400, 50, 0.5),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images of one step, over all processes.
        learning_rate: Largest learning rate of SGD with momentum 0.9.
        weight_decay: L2 penalty on all weights.
        schedule: Name in :data:`SCHEDULES`: ``one-cycle`` (up for a fifth of the training, then
            down a cosine), ``cosine`` (down from the first step), or ``step`` (multiplied by
            ``decay`` every ``step_epochs``).
        loss: Name in :data:`training.trainer.targets.LOSSES`.
        augmentation: Name in :data:`training.trainer.augmentation.AUGMENTATIONS`.
        nesterov: Nesterov's momentum.
        step_epochs: Epochs between two steps.
        decay: Factor of a step.
        ema: Decay per step of the moving average of the weights (EMA), which is then evaluated and
            kept; smaller at first, so that short runs do not keep their first weights; 0 keeps
            the weights themselves.
        temperature: The teacher's distributions are softened by it; 1 as published.
        ldg_share: Weight of the LDG in ``--targets ldg+onehot`` and ``ldg+votes``, 0 to 1.
        views: Augmented views of every image for which the teacher is queried once, before
            the training; 0 queries it in every step, as published.
        select: Which images choose the epoch that is kept: ``holdout`` (a seeded tenth of train,
            then not trained on), ``validation``, ``test`` (as published), or ``last`` (none).
        whole_batches: Leave out an epoch's last batch where it is not full.
        calibrate: Fit a temperature on the images of ``holdout`` or ``validation`` at the end.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: str
    loss: str
    augmentation: str
    nesterov: bool = False
    step_epochs: int = 30
    decay: float = 0.1
    ema: float = 0.0
    temperature: float = 1.0
    ldg_share: float = 0.5
    views: int = 0
    select: str = "holdout"
    whole_batches: bool = True
    calibrate: bool = True

    def optimizer(self, model: nn.Module, rate: torch.Tensor) -> torch.optim.Optimizer:
        """SGD over all parameters, with a learning rate that lies on their device."""
        return torch.optim.SGD(
            model.parameters(),
            lr=rate,
            momentum=0.9,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True,
        )

    def learning_rate_at(self, progress: float) -> float:
        """Learning rate at ``progress`` epochs (a fraction within an epoch counts)."""
        if self.schedule == "step":
            return float(self.learning_rate * self.decay ** int(progress // self.step_epochs))
        # One cycle (Smith 2018): up linearly over the first fifth, then down a cosine to zero.
        rise = 0.2 if self.schedule == "one-cycle" else 0.0
        position = progress / self.epochs
        if position < rise:
            return self.learning_rate * (0.04 + 0.96 * position / rise)
        angle = math.pi * (position - rise) / (1 - rise)
        return self.learning_rate * 0.5 * (1 + math.cos(angle))


# For networks that start from scratch; docs/training.md has the measurements behind them.
DEFAULT_STUDENT = Recipe(
    epochs=30,
    batch_size=64,
    learning_rate=0.15,
    weight_decay=5e-4,
    schedule="one-cycle",
    loss="cross-entropy",
    augmentation="strong",
    nesterov=True,
    ema=0.998,
    views=8,
)
# For a few pictures more, from weights that have seen many.
FINE_TUNED_STUDENT = dataclasses.replace(DEFAULT_STUDENT, learning_rate=0.03)
DEFAULT_TEACHER = dataclasses.replace(DEFAULT_STUDENT, epochs=20, learning_rate=0.05, views=0)


def published_student(preset: str) -> Recipe:
    """The public code's recipe for a data set; RAF-DB's for one that it does not know.

    Source: the public EfficientFace code and section 4.2 of the paper.
    """
    epochs, step_epochs, decay = PUBLISHED_SCHEDULES.get(preset, PUBLISHED_SCHEDULES["rafdb"])
    return Recipe(
        epochs=epochs,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=1e-4,
        schedule="step",
        loss="published",
        augmentation="published",
        step_epochs=step_epochs,
        decay=decay,
        select="test",
        whole_batches=False,
        calibrate=False,
    )
