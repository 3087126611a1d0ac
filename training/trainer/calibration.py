"""Two numbers that calibrate a network: a temperature, and how much of the prior to take out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from efficientface_deploy.artifact import provenance_from_metadata, read_safetensors_metadata
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.dataset import Sample, class_frequencies
from efficientface_deploy.workbench.evaluation import labels_of, predict, softmax
from efficientface_deploy.workbench.metrics import IndexArray, expected_calibration_error
from training.trainer.checkpointing import save_result
from training.trainer.config import Job
from training.trainer.inference import infer_with
from training.trainer.sureness import fit_threshold

LOWEST, HIGHEST = 0.05, 20.0
_LIKELIHOOD_RATIO = 6.63  # the 99th percentile of chi-square, one degree of freedom


def fit_temperature(logits: Float32Array, labels: IndexArray) -> float:
    """The temperature T that minimises the cross-entropy of softmax(logits / T).

    Temperature scaling, Guo et al. 2017, section 4.2.
    The cross-entropy is convex in 1 / T; its minimum is found by bisecting the sign of its slope.

    Args:
        logits: float32 (N, C), of images that the network was not trained on.
        labels: Integers (N,).

    Returns:
        T, 0.05 to 20. Above 1 the network was too confident.
    """
    scores = torch.from_numpy(np.asarray(logits, dtype=np.float64))  # (N, C)
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64))  # (N,)
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(60):
        inverse = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        functional.cross_entropy(scores * inverse, targets).backward()  # type: ignore[no-untyped-call]
        assert inverse.grad is not None
        if inverse.grad > 0:
            high = inverse.item()
        else:
            low = inverse.item()
    return 2 / (low + high)


def fit_prior_strength(
    logits: Float32Array, labels: IndexArray, frequencies: Sequence[float], temperature: float
) -> float:
    """How much of the training's class frequencies to take out of the logits.

    That is the s that minimises the cross-entropy of softmax((logits - s log f) / T) over s and T,
    a convex problem in 1 / T and s / T. What learns from soft distributions leans to the frequent
    classes: a picture between two of them it gives to the more frequent one more often than people
    do. Post-hoc logit adjustment (Menon et al. 2021, section 4.1), weak, and its strength fitted.

    Args:
        logits: float32 (N, C), of images that the network was not trained on.
        labels: Integers (N,).
        frequencies: f, the share of each of the C classes in training, positive.
        temperature: Of these logits as they are, from :func:`fit_temperature`.

    Returns:
        s; 0 where the images do not show that another is better, by a test of the likelihood ratio
        (99 %, one degree of freedom).
    """
    scores = torch.from_numpy(np.asarray(logits, dtype=np.float64))  # (N, C)
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64))  # (N,)
    prior = torch.tensor(frequencies, dtype=torch.float64).log()  # (C,)
    start = [1 / temperature, 0.0]
    inverse_and_strength = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([inverse_and_strength], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        inverse, strength = inverse_and_strength
        return functional.cross_entropy(scores * inverse - strength * prior, targets)

    def step() -> float:
        solver.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    without = loss().item()
    solver.step(step)  # type: ignore[no-untyped-call]
    ratio = 2 * len(logits) * (without - loss().item())
    inverse, strength = inverse_and_strength.tolist()
    return strength / inverse if ratio > _LIKELIHOOD_RATIO and inverse > 0 else 0.0


def fold(model: nn.Module, temperature: float, shift: Float32Array) -> None:
    """Make a network's logits (logits - shift) / temperature, by its last layer's weights.

    Args:
        model: A network whose last layer is ``fc``, changed in place.
        temperature: From :func:`fit_temperature`.
        shift: float32 (C,).
    """
    head = next(m for name, m in model.named_modules() if name.split(".")[-1] == "fc")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.div_(temperature)
        head.bias.sub_(torch.from_numpy(shift).to(head.bias.device)).div_(temperature)


def calibrate(job: Job, selection: Sequence[Sample], device: torch.device) -> None:
    """Fit the saved network's temperature, prior strength and threshold of sure labels.

    All on the images that chose its epoch.

    In the weights that are saved of a student, part of the prior is taken out of the logits, and
    they are divided by the temperature. A teacher's are left: the published recipe takes its
    distributions as they are.
    """
    record = provenance_from_metadata(read_safetensors_metadata(job.result), job.result)
    if "calibration" in record:  # the run was whole before it went on
        return
    model = load_checkpoint(job.result)[0].to(memory_format=torch.channels_last).to(device)
    logits = predict(infer_with(model, job.spec, device), selection, job.spec)  # (N, C)
    labels = labels_of(selection)
    before = expected_calibration_error(softmax(logits), labels)
    folded = job.kind == "student"
    shares = class_frequencies(job.dataset.split("train"), job.spec.num_classes)
    strength, shift = 0.0, np.zeros(job.spec.num_classes, np.float32)
    temperature = fit_temperature(logits, labels)
    if temperature < 1.01 * LOWEST:  # the cross-entropy falls for ever towards T = 0
        print(
            f"note: all {len(selection):,} images of {job.recipe.select} are classified correctly, "
            "which gives no temperature; the confidences are not calibrated"
        )
        temperature = 1.0
    elif temperature > 0.99 * HIGHEST:  # it falls for ever towards equal probabilities
        print(
            f"note: on {job.recipe.select} its confidences fit best when all classes are equally "
            "likely; it has not learned to tell them apart"
        )
    elif folded and shares is not None:
        strength = fit_prior_strength(logits, labels, shares, temperature)
        shift = (strength * np.log(shares)).astype(np.float32)
        temperature = fit_temperature(logits - shift, labels)
    calibrated = (logits - shift) / temperature
    after = expected_calibration_error(softmax(calibrated), labels)
    if folded:
        fold(model, temperature, shift)
    record["calibration"] = {
        "temperature": temperature,
        "prior_strength": strength,
        "images": len(selection),
        "ece_before": before,
        "ece_after": after,
        "folded": folded,
    }
    sure_above = fit_threshold(softmax(calibrated if folded else logits), labels)
    save_result(job, model, record, sure_above)
    print(
        f"calibration error on {job.recipe.select}: {before:.4f}, {after:.4f} at temperature "
        f"{temperature:.3f}, which is {'now in' if folded else 'left out of'} the weights"
    )
    if strength:
        print(f"taken out of the logits, too: {strength:.2f} of the class frequencies' logarithms")
