"""Temperature scaling (Guo et al. 2017, section 4.2): one number that makes confidence honest."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from efficientface_deploy.metrics import IndexArray, expected_calibration_error
from efficientface_deploy.preprocess import Float32Array

_RANGE = (0.05, 20.0)


def fit_temperature(logits: Float32Array, labels: IndexArray) -> float:
    """The temperature T that minimises the cross-entropy of softmax(logits / T).

    The cross-entropy is convex in 1 / T; its minimum is found by bisecting the sign of its slope.

    Args:
        logits: float32 (N, C), of images that the network was not trained on.
        labels: Integers (N,).

    Returns:
        T, 0.05 to 20. Above 1 the network was too sure of itself.
    """
    scores = torch.from_numpy(np.asarray(logits, dtype=np.float64))  # (N, C)
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64))  # (N,)
    low, high = 1 / _RANGE[1], 1 / _RANGE[0]
    for _ in range(60):
        inverse = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        functional.cross_entropy(scores * inverse, targets).backward()  # type: ignore[no-untyped-call]
        assert inverse.grad is not None
        if inverse.grad > 0:
            high = inverse.item()
        else:
            low = inverse.item()
    return 2 / (low + high)


def is_certain(temperature: float) -> bool:
    """Whether the cross-entropy falls for ever towards T = 0, as when every image is told right."""
    return temperature < 1.01 * _RANGE[0]


def says_nothing(temperature: float) -> bool:
    """Whether the cross-entropy falls for ever towards equal probabilities."""
    return temperature > 0.99 * _RANGE[1]


def calibration_errors(
    logits: Float32Array, labels: IndexArray, temperature: float
) -> tuple[float, float]:
    """Expected calibration error before and after dividing the logits by ``temperature``."""
    scores = torch.from_numpy(np.asarray(logits))
    before, after = (
        expected_calibration_error((scores / by).softmax(dim=1).numpy(), labels)
        for by in (1.0, temperature)
    )
    return before, after


def fold_temperature(model: nn.Module, temperature: float) -> None:
    """Divide the network's logits by the temperature, in its last layer's weights.

    Args:
        model: A network whose last layer is ``fc``, changed in place.
        temperature: From :func:`fit_temperature`.
    """
    head = next(m for name, m in model.named_modules() if name.split(".")[-1] == "fc")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.div_(temperature)
        head.bias.div_(temperature)
