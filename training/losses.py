"""Losses from label distributions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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
