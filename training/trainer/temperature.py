"""Temperature scaling (Guo et al. 2017, section 4.2): one number that calibrates confidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from efficientface_deploy.artifact import provenance_from_metadata, read_safetensors_metadata
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.dataset import Sample
from efficientface_deploy.workbench.evaluation import labels_of, predict, softmax
from efficientface_deploy.workbench.metrics import IndexArray, expected_calibration_error
from training.trainer.checkpointing import save_result
from training.trainer.config import Job
from training.trainer.inference import infer_with
from training.trainer.sureness import fit_threshold

LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(logits: Float32Array, labels: IndexArray) -> float:
    """The temperature T that minimises the cross-entropy of softmax(logits / T).

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


def calibration_errors(
    logits: Float32Array, labels: IndexArray, temperature: float
) -> tuple[float, float]:
    """Expected calibration error before and after dividing the logits by ``temperature``."""
    before, after = (
        expected_calibration_error(softmax(logits / by), labels) for by in (1.0, temperature)
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


def calibrate(job: Job, selection: Sequence[Sample], device: torch.device) -> None:
    """Fit the saved network's temperature and the threshold of its sure labels.

    Both on the images that chose its epoch.

    A student's logits are divided by it, in the weights that are saved. A teacher's are not: the
    published recipe takes its distributions at temperature 1.
    """
    record = provenance_from_metadata(read_safetensors_metadata(job.result), job.result)
    if "calibration" in record:  # the run was whole before it went on
        return
    model = load_checkpoint(job.result)[0].to(memory_format=torch.channels_last).to(device)
    logits = predict(infer_with(model, job.spec, device), selection, job.spec)  # (N, C)
    labels = labels_of(selection)
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
    before, after = calibration_errors(logits, labels, temperature)
    folded = job.kind == "student"
    if folded:
        fold_temperature(model, temperature)
    record["calibration"] = {
        "temperature": temperature,
        "images": len(selection),
        "ece_before": before,
        "ece_after": after,
        "folded": folded,
    }
    sure_above = fit_threshold(softmax(logits / (temperature if folded else 1)), labels)
    save_result(job, model, record, sure_above)
    print(
        f"calibration error on {job.recipe.select}: {before:.4f}, {after:.4f} at temperature "
        f"{temperature:.3f}, which is {'now in' if folded else 'left out of'} the weights"
    )
