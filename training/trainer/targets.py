"""What a student learns from, labels, votes, an LDG's distributions or a blend; and the losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from efficientface_deploy.errors import CheckpointError, DatasetError
from efficientface_deploy.files import file_hash
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.dataset import Sample, label_distributions
from training.trainer.small_maps import use_matrix_products

TARGETS = ("ldg", "onehot", "votes", "ldg+onehot", "ldg+votes")

# The target distributions of a batch: (images (N, 3, S, S), what the loader gave (N, C)) -> (N, C).
TargetFunction = Callable[[Tensor, Tensor], Tensor]


def loaded_targets(images: Tensor, targets: Tensor) -> Tensor:
    """What the loader gave, unchanged: labels, votes, or stored distributions, (N, C)."""
    return targets


def dataset_targets(samples: Sequence[Sample], classes: int, *, votes: bool) -> np.ndarray:
    """The data set's own targets, float32 (N, C): the votes, or one-hot labels.

    Raises:
        DatasetError: Votes are wanted and there are none.
    """
    if votes and any(sample.votes is None for sample in samples):
        wanted = "a data set with a column of votes for each class"
        fix = "choose other --targets for a student; leave --votes out for a teacher"
        raise DatasetError("votes as targets", wanted, "one without", fix)
    if not votes:
        samples = [Sample(sample.path, sample.label) for sample in samples]
    return label_distributions(samples, classes)


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
        """Blend float (N, C) distributions with the data set's targets (N, C)."""
        if self.temperature != 1:
            # By logarithms, since at low temperatures the powers would all be zero.
            distribution = (distribution.log() / self.temperature).softmax(dim=-1)
        if self.ldg_share == 1:
            return distribution
        return self.ldg_share * distribution + (1 - self.ldg_share) * own


class Teacher:
    """A frozen network, an LDG above all, that sees the student's augmented images.

    Source: section 3.3 of the paper.

    Args:
        path: The LDG's checkpoint.
        preset_name: What a published checkpoint was trained on.
        spec: The student's.
        device: Where to compute.
        amp: Lower precision to compute in, as the student's own layers do; None for float32.

    Attributes:
        digest: Names the file's content.

    Raises:
        CheckpointError: The checkpoint has other classes or colours.
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
        if own.labels != spec.labels:
            fix = (
                "say with --preset what a published checkpoint was trained on, or train a teacher "
            )
            fix += "on this data set with python -m training.teacher"
            wanted = f"labels {', '.join(spec.labels)}, as the data set has"
            raise CheckpointError(path, wanted, ", ".join(own.labels), fix)
        if own.colour != spec.colour:
            fix = (
                "prepare the data set with --preset ferplus for grey pictures, for both networks; "
            )
            fix += "--init bundled sees grey whatever the data set has"
            wanted = f"colour {spec.colour}, as the student sees"
            raise CheckpointError(path, wanted, own.colour, fix)
        use_matrix_products(model, device, amp)
        self.digest = file_hash(path)
        self.model: nn.Module = model.to(memory_format=torch.channels_last).to(device)
        self.device = device
        self.amp = amp
        self.side = own.input_size
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
        side = (self.side, self.side)
        if images.shape[-2:] != side:
            images = functional.interpolate(images, side, mode="bilinear", antialias=True)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits: Tensor = self.model(images)  # (N, C)
        return logits.to(images.dtype).softmax(dim=1)


class Ensemble:
    """Several teachers as one: the mean of their distributions, which is a distribution again.

    Networks of other sizes, seeds or architectures err on other pictures, so that their mean is
    better than each of them (docs/training.md has figures).

    Args:
        members: Teachers on one device, in one precision.
        flips: Ask each about the mirrored picture too.
    """

    def __init__(self, members: Sequence[Teacher], *, flips: bool = False) -> None:
        self.members = members
        self.flips = flips
        self.device, self.amp = members[0].device, members[0].amp
        self.digest = " + ".join(member.digest for member in members) + " flipped" * flips

    def __call__(self, images: Tensor) -> Tensor:
        """Their mean distributions (N, C) for the student's input (N, 3, S, S)."""
        views = [images, images.flip(-1)] if self.flips else [images]
        answers = [member(view) for member in self.members for view in views]
        return torch.stack(answers).mean(dim=0) if len(answers) > 1 else answers[0]


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


# ---- Losses: (logits (N, C), target distributions (N, C), rows sum to one) -> a scalar

Loss = Callable[[Tensor, Tensor], Tensor]


def published_loss(logits: Tensor, distribution: Tensor) -> Tensor:
    """The paper's loss as its public code computes it: mean over batch *and* classes.

    Its gradient is 1/C of :func:`cross_entropy`'s, which the published learning rate of 0.1
    presupposes. The target is the LDG's softmax at temperature 1.
    """
    return -(distribution * logits.log_softmax(dim=1)).mean()


def cross_entropy(logits: Tensor, distribution: Tensor) -> Tensor:
    """Cross-entropy from a distribution: sum over classes, mean over the batch.

    One-hot rows give ordinary cross-entropy.
    """
    return -(distribution * logits.log_softmax(dim=1)).sum(dim=1).mean()


LOSSES: dict[str, Loss] = {"published": published_loss, "cross-entropy": cross_entropy}
