"""Other class frequencies in the place of the training set's, when a model is loaded.

What a network says of a face holds two things: what it sees, and how often each class came where it
was trained. The second can be exchanged by Bayes' rule, without training anew (Saerens et al.
2002; Menon et al. 2021 call it logit adjustment)::

    log p'(class) = log p(class) - log frequency in training + log frequency wanted

up to a constant, so that probabilities sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array

UNIFORM = "uniform"

Prior = str | Mapping[str, float]
"""``uniform``, or a weight of 0 or more for each label; only their ratios count."""


def parse_prior(text: str) -> Prior:
    """Read a prior from a command line: ``uniform``, or ``Neutral=2,Happiness=1,...``.

    Raises:
        ConfigError: It is something else.
    """
    if text == UNIFORM:
        return text
    weights: dict[str, float] = {}
    pieces = text.split(",")
    while pieces:
        part = pieces.pop(0)
        while "=" not in part and pieces:  # a label may have commas in it
            part += "," + pieces.pop(0)
        label, _, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            label = ""
        if not label.strip() or label.strip() in weights:
            raise _bad("uniform, or LABEL=WEIGHT for each label once", repr(part))
        weights[label.strip()] = value
    return weights


def log_ratios(prior: Prior, spec: ModelSpec, path: Path) -> Float32Array:
    """What is added to a model's logits so that another prior takes the place of its own.

    Args:
        prior: The prior that is wanted.
        spec: The model's.
        path: Its file, for errors.

    Returns:
        float32 (C,); minus infinity for a weight of 0.

    Raises:
        ConfigError: The prior is not one for these labels, or the file does not say how often
            each class came in its training.
    """
    weights = _weights(prior, spec.labels)
    if spec.class_frequencies is None:
        fix = "leave it out, or add them: python -m training.evaluate --fit, then export it again"
        expected = f"the class frequencies of the training in {path.name}"
        raise ConfigError("prior", expected, "none", fix)
    with np.errstate(divide="ignore"):
        wanted = np.log(np.array(weights, dtype=np.float64) / max(weights))
    ratios: Float32Array = (wanted - np.log(spec.class_frequencies)).astype(np.float32)
    return ratios


def adjust(logits: Float32Array, ratios: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Logits and probabilities (N, C) under another prior.

    Args:
        logits: float32 (N, C), finite.
        ratios: From :func:`log_ratios`.
    """
    adjusted = logits + ratios
    powers = np.exp(adjusted - adjusted.max(axis=1, keepdims=True))
    return adjusted, powers / powers.sum(axis=1, keepdims=True)


def _weights(prior: Prior, labels: tuple[str, ...]) -> list[float]:
    """The weight of each label, in their order."""
    if isinstance(prior, str) and prior == UNIFORM:
        return [1.0] * len(labels)
    if not isinstance(prior, Mapping):
        raise _bad("uniform, or a weight for each label", repr(prior)[:40])
    if missing := [label for label in labels if label not in prior]:
        raise _bad("a weight for each label", "none for " + ", ".join(missing))
    if unknown := [str(label)[:40] for label in prior if label not in labels]:
        raise _bad("labels of the model (" + ", ".join(labels) + ")", ", ".join(unknown))
    for label, weight in prior.items():
        if not _is_weight(weight):
            raise _bad("finite weights of 0 or more", f"{weight!r:.40} for {label}")
    weights = [float(prior[label]) for label in labels]
    if not any(weights):
        raise _bad("a weight above 0", "0 for all labels")
    return weights


def _is_weight(value: object) -> bool:
    try:
        return not isinstance(value, (bool, str)) and 0 <= float(value) < math.inf  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _bad(expected: str, found: str) -> ConfigError:
    return ConfigError("prior", expected, found, "give uniform, or LABEL=WEIGHT,... of all labels")
