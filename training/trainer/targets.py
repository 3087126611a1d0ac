"""What a student learns from: labels, votes, an LDG's distributions, or a blend of two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transform

from efficientface_deploy.errors import CheckpointError
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.spec import ModelSpec
from training.trainer.small_maps import use_matrix_products

TARGETS = ("ldg", "onehot", "votes", "ldg+onehot", "ldg+votes")

# Gives the target distribution of a batch: (images (N, 3, S, S), own targets (N, C)) -> (N, C).
Teach = Callable[[Tensor, Tensor], Tensor]


def own_targets(images: Tensor, targets: Tensor) -> Tensor:
    """The data set's own targets, or stored ones, (N, C), unchanged."""
    return targets


@dataclasses.dataclass(frozen=True)
class Blend:
    """How an LDG's distribution and the data set's own target become one.

    Attributes:
        temperature: Softens the LDG: its probabilities to the power 1 / temperature, normalised,
            which is the softmax of its logits divided by the temperature.
        ldg_share: Weight of the LDG, 0 to 1; the rest is the data set's own target.
    """

    temperature: float = 1.0
    ldg_share: float = 1.0

    def __call__(self, distribution: Tensor, own: Tensor) -> Tensor:
        """Blend float (N, C) distributions with own targets (N, C)."""
        if self.temperature != 1:
            # By logarithms, since at low temperatures the powers would all be zero.
            distribution = (distribution.log() / self.temperature).softmax(dim=-1)
        if self.ldg_share == 1:
            return distribution
        return self.ldg_share * distribution + (1 - self.ldg_share) * own


class Teacher:
    """A frozen LDG that sees the student's augmented images (section 3.3 of the paper).

    Args:
        path: The LDG's checkpoint.
        preset_name: What a published checkpoint was trained on.
        spec: The student's.
        device: Where to compute.
        amp: Lower precision to compute in, as the student's own layers do; None for float32.

    Raises:
        CheckpointError: The checkpoint is a student, or has other classes or colours.
    """

    def __init__(
        self,
        path: Path,
        preset_name: str | None,
        spec: ModelSpec,
        device: torch.device,
        amp: torch.dtype | None = None,
    ) -> None:
        model, own = load_checkpoint(path, preset_name)
        for what, theirs, ours in (
            ("labels", own.labels, spec.labels),
            ("colour", own.colour, spec.colour),
        ):
            if theirs != ours:
                raise CheckpointError(
                    path,
                    f"{what} {_listed(ours)}, as the data set has",
                    _listed(theirs),
                    "say with --preset what a published checkpoint was trained on, or train a "
                    "teacher on this data set with python -m training.teacher",
                )
        if own.architecture == "efficientface":
            raise CheckpointError(
                path,
                "an LDG (resnet18 or resnet50)",
                "an EfficientFace",
                "give the teacher's checkpoint",
            )
        use_matrix_products(model, device, amp)
        self.path = path
        self.model: nn.Module = model.to(memory_format=torch.channels_last).to(device)
        self.device = device
        self.amp = amp
        self.side = [own.input_size, own.input_size]
        # From the student's normalisation to the LDG's: x * scale + offset.
        student_mean, student_std = _channels(spec.mean, device), _channels(spec.std, device)
        own_mean, own_std = _channels(own.mean, device), _channels(own.std, device)
        self.scale = student_std / own_std  # (1, 3, 1, 1)
        self.offset = (student_mean - own_mean) / own_std
        self.same_normalisation = (spec.mean, spec.std) == (own.mean, own.std)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The LDG's distributions (N, C) for the student's input (N, 3, S, S)."""
        if not self.same_normalisation:
            images = images * self.scale + self.offset
        if list(images.shape[-2:]) != self.side:
            images = transform.resize(images, self.side, antialias=True)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits: Tensor = self.model(images)
        return logits.to(images.dtype).softmax(dim=1)


def _listed(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


Loss = Callable[[Tensor, Tensor], Tensor]


def published_loss(logits: Tensor, distribution: Tensor) -> Tensor:
    """The paper's loss as its public code computes it: mean over batch *and* classes.

    Its gradient is 1/C of :func:`cross_entropy`'s, which the published learning rate of 0.1
    presupposes.

    Args:
        logits: (N, C), the student's.
        distribution: (N, C), rows sum to one; the LDG's softmax at temperature 1.

    Returns:
        A scalar.
    """
    return -(distribution * logits.log_softmax(dim=1)).mean()


def cross_entropy(logits: Tensor, distribution: Tensor) -> Tensor:
    """Cross-entropy from a distribution: sum over classes, mean over the batch.

    Args:
        logits: (N, C).
        distribution: (N, C), rows sum to one; one-hot rows give ordinary cross-entropy.

    Returns:
        A scalar.
    """
    return -(distribution * logits.log_softmax(dim=1)).sum(dim=1).mean()


LOSSES: dict[str, Loss] = {"published": published_loss, "cross-entropy": cross_entropy}
