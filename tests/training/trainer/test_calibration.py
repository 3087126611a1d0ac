from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientface_deploy.artifact import PROVENANCE_KEY, read_safetensors_metadata
from efficientface_deploy.models import (
    EfficientFace,
    LabelDistributionGenerator,
    load_checkpoint,
)
from efficientface_deploy.models.checkpoint import read_weights
from efficientface_deploy.vision.preprocess import normalise, to_model_input
from training.trainer import calibration
from training.trainer.calibration import (
    HIGHEST,
    LOWEST,
    fit_prior_strength,
    fit_temperature,
    fold,
)
from training.trainer.loader import hold_out


@pytest.fixture
def honest() -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 (4000, 5) whose softmax says exactly how often each class comes."""
    generator = np.random.default_rng(1)  # 0 is one of the hundred that lean by chance
    logits = 2 * generator.standard_normal((4000, 5)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([generator.choice(5, p=row / row.sum()) for row in probabilities])
    return logits, labels


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0, 10.0])
def test_finds_the_factor_that_made_logits_dishonest(factor, honest):
    logits, labels = honest
    temperature = fit_temperature(factor * logits, labels)
    assert temperature == pytest.approx(factor * fit_temperature(logits, labels), rel=1e-3)
    assert temperature == pytest.approx(factor, rel=0.06)


def test_is_the_minimum_of_the_cross_entropy(honest):
    logits, labels = honest
    scores, targets = torch.from_numpy(logits).double(), torch.from_numpy(labels)

    def loss(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(scores / temperature, targets).item()

    best = fit_temperature(logits, labels)
    assert loss(best) <= min(loss(best * 1.01), loss(best / 1.01))


FREQUENCIES = (0.5, 0.3, 0.1, 0.08, 0.02)


def prior_strength(logits, labels, frequencies):
    return fit_prior_strength(logits, labels, frequencies, fit_temperature(logits, labels))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("strength", [-0.3, 0.2, 0.7])
def test_finds_how_much_of_the_prior_is_too_much(strength, factor, honest):
    logits, labels = honest
    leaning = (factor * (logits + strength * np.log(FREQUENCIES))).astype(np.float32)
    found = prior_strength(leaning, labels, FREQUENCIES)
    assert found / factor == pytest.approx(strength, abs=0.06)  # in the leaning logits' own scale
    shift = found * np.log(FREQUENCIES)
    temperature = fit_temperature(leaning - shift, labels)
    assert temperature == pytest.approx(factor, rel=0.06)

    def loss(temperature: float, strength: float) -> float:
        scores = torch.from_numpy((leaning - strength * np.log(FREQUENCIES)) / temperature)
        return torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels)).item()

    best = loss(temperature, found)
    assert best <= min(loss(temperature * by, found) for by in (0.99, 1.01)) + 1e-9
    assert best <= min(loss(temperature, found + by) for by in (-0.01, 0.01)) + 1e-9


def test_prior_is_left_where_nothing_shows_that_it_is_too_much(honest):
    logits, labels = honest
    assert prior_strength(logits, labels, FREQUENCIES) == 0
    leaning = (logits + 0.2 * np.log(FREQUENCIES)).astype(np.float32)
    assert prior_strength(leaning[:40], labels[:40], FREQUENCIES) == 0  # too few images
    assert prior_strength(leaning, labels, (0.2,) * 5) == 0  # no class is more frequent


def test_logits_that_are_always_right_give_the_smallest_temperature():
    assert fit_temperature(np.eye(3, dtype=np.float32), np.arange(3)) == pytest.approx(
        0.05, rel=0.01
    )


def test_ends_of_the_range_are_told_apart(honest):
    right, wrong = np.eye(3, dtype=np.float32), 1 - np.eye(3, dtype=np.float32)
    logits, labels = honest
    cases = [(right, np.arange(3)), (wrong, np.arange(3)), (logits, labels)]
    temperatures = [fit_temperature(*case) for case in cases]
    assert [t < 1.01 * LOWEST for t in temperatures] == [True, False, False]
    assert [t > 0.99 * HIGHEST for t in temperatures] == [False, True, False]


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_folding_shifts_and_divides_the_logits(network):
    torch.manual_seed(0)
    model = EfficientFace(7) if network == "student" else LabelDistributionGenerator(7, "resnet18")
    images, shift = torch.randn(2, 3, 32, 32), np.arange(7, dtype=np.float32)
    with torch.no_grad():
        before = model.eval()(images)
        fold(model, 2.5, shift)
        torch.testing.assert_close(model(images), (before - torch.arange(7)) / 2.5)


# ---- At the end of a training --------------------------------------------------------------------


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_weights(path)[0]


def provenance(path: Path) -> dict:
    return json.loads(read_safetensors_metadata(path)[PROVENANCE_KEY])


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_temperature_ends_up_in_the_weights_of_a_student(make_job, fit):
    job = make_job(epochs=1, learning_rate=0.1)
    before = fit(dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, calibrate=False)))
    plain = weights(before)
    shutil.rmtree(job.config.out)
    after = weights(fit(job))
    record = provenance(job.result)["calibration"]
    assert record["folded"] and record["images"] == 7 and record["temperature"] != 1
    assert record["prior_strength"] == 0  # each class comes as often
    assert record["ece_after"] < record["ece_before"]
    spec = load_checkpoint(job.result)[1]
    assert spec.class_frequencies == pytest.approx([1 / 7] * 7)
    assert (spec.sure_above, spec.sure_precision) == (1, 0.95)  # seven images show nothing
    for name in ("fc.weight", "fc.bias"):
        torch.testing.assert_close(after.pop(name) * record["temperature"], plain.pop(name))
    assert_same_bits(after, plain)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_threshold_is_that_of_the_saved_networks_confidences(kind, make_job, fit, monkeypatch):
    job = dataclasses.replace(make_job(epochs=1, learning_rate=0.1), kind=kind)
    seen = []
    monkeypatch.setattr(
        calibration, "fit_threshold", lambda p, labels: seen.append((p, labels)) or 0.75
    )
    fit(job)
    model, spec = load_checkpoint(job.result)
    assert spec.sure_above == 0.75
    ((probabilities, labels),) = seen
    samples = hold_out(job.dataset.split("train"), job.config.seed)[1]
    images = np.stack([to_model_input(sample.path, spec) for sample in samples])
    with torch.inference_mode():
        expected = model(torch.from_numpy(normalise(images, spec))).softmax(dim=1).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    assert labels.tolist() == [sample.label for sample in samples]


def test_part_of_the_prior_is_taken_out_of_the_weights_of_a_student(
    make_job, fit, monkeypatch, capsys
):
    job = make_job(epochs=1, learning_rate=0.1)
    before = fit(dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, calibrate=False)))
    plain = weights(before)
    shutil.rmtree(job.config.out)
    shares = np.array([0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04])
    monkeypatch.setattr(calibration, "class_frequencies", lambda *_: tuple(shares))
    monkeypatch.setattr(calibration, "fit_prior_strength", lambda *_: 0.25)
    monkeypatch.setattr(calibration, "fit_temperature", lambda *_: 2.0)
    after = weights(fit(job))
    record = provenance(job.result)["calibration"]
    assert record["prior_strength"] == 0.25
    assert "taken out of the logits, too: 0.25 of the class freq" in capsys.readouterr().out
    shift = torch.from_numpy(0.25 * np.log(shares)).float()
    expected = (plain["fc.bias"] - shift) / record["temperature"]
    torch.testing.assert_close(after["fc.bias"], expected)
    torch.testing.assert_close(after["fc.weight"] * record["temperature"], plain["fc.weight"])


def test_teacher_keeps_temperature_one(make_job, fit):
    job = dataclasses.replace(make_job(epochs=1), kind="teacher")
    fit(job)
    record = provenance(job.result)["calibration"]
    assert not record["folded"] and record["temperature"] > 0
    assert_same_bits(weights(job.result), torch.load(job.state, weights_only=True)["model"])


def test_perfect_holdout_gives_no_temperature(make_job, fit, monkeypatch, capsys):
    """Its cross-entropy falls for ever: dividing by the limit would make every answer certain."""
    job = make_job(epochs=1, select="holdout", calibrate=True)
    logits = 5 * np.eye(7, dtype=np.float32)
    monkeypatch.setattr(calibration, "predict", lambda *_: logits)
    fit(job)
    record = provenance(job.result)["calibration"]
    assert (record["temperature"], record["prior_strength"]) == (1, 0)
    assert (
        "all 7 images of holdout are classified correctly, which gives no temperature"
        in capsys.readouterr().out
    )
