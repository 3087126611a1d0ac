from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientface_deploy.artifact import PROVENANCE_KEY, read_safetensors_metadata
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.models.checkpoint import read_weights
from training.trainer import loop
from training.trainer.distributed import Distributed
from training.trainer.loader import TrainingImages, choose_samples
from training.trainer.loop import train
from training.trainer.recipe import published_student
from training.trainer.targets import LOSSES, loaded_targets

STEPS = 3  # 56 images, 7 held out, batches of 16
ALONE = Distributed(torch.device("cpu"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_weights(path)[0]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def provenance(path: Path) -> dict:
    return json.loads(read_safetensors_metadata(path)[PROVENANCE_KEY])


def history(out: Path) -> list[dict[str, float]]:
    with (out / "metrics.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return rows


# ---- Learning ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_tells_two_expressions_apart(make_job, fit):
    """Sixteen faces that show Surprise or Disgust; guessing among the two costs log 2."""
    job = make_job(epochs=20, batch_size=8, input_size=48, select="last")
    two = [sample for sample in job.dataset.split("train") if sample.label in (3, 5)]
    images = TrainingImages(two, job.spec, "mild", 0)
    torch.manual_seed(0)
    train(job, EfficientFace(7), images, [], loaded_targets, ALONE)
    losses = [row["loss"] for row in history(job.config.out)]
    assert losses[0] > 1.5
    assert losses[-1] < math.log(2) - 0.2


def test_same_seed_same_bits_and_another_seed_others(make_job, fit, tmp_path):
    runs = [
        weights(fit(make_job(epochs=1, out=tmp_path / name, seed=seed, workers=workers)))
        for name, seed, workers in (("a", 0, 0), ("b", 0, 1), ("c", 1, 0))
    ]
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0]["fc.weight"], runs[2]["fc.weight"])


def test_every_step_sees_a_whole_batch_of_fresh_views(make_job, fit):
    seen = []

    def see(images, targets):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.shape == (16, 3, 32, 32) and targets.shape == (16, 7)
        seen.extend(image.numpy().tobytes() for image in images)
        return targets

    fit(make_job(epochs=2), see)
    assert len(seen) == len(set(seen)) == 2 * STEPS * 16  # no picture twice in two epochs


def test_schedule_reaches_the_optimizer(make_job, fit, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *arguments, **keywords):
        rates.append(float(self.param_groups[0]["lr"]))
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    job = make_job(epochs=2, select="last")
    fit(job)
    expected = [job.recipe.learning_rate_at(step / 3) for step in range(2 * 3)]
    assert rates == pytest.approx(expected)


def test_votes_reach_the_loss(make_job, fit):
    seen = []

    def see(images, targets):
        seen.append(targets)
        return targets

    fit(make_job(epochs=1), see, votes=True)
    assert ((torch.cat(seen) > 0) & (torch.cat(seen) < 1)).any()


def test_loss_that_is_not_finite_stops_the_training(make_job, fit):
    job = make_job(learning_rate=1e30)
    with pytest.raises(
        ConfigError,
        match=r"rate 1e\+30, weight decay 0\.0005: expected a finite loss, found nan .* "
        "start again with a smaller --learning-rate or --weight-decay$",
    ):
        fit(job)
    assert not job.result.exists()


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2])
def test_step_whose_loss_was_not_finite_is_named(step, make_job, fit, monkeypatch):
    """The device is asked for it only now and then, here at an epoch's end."""
    calls = []

    def spoil(images, targets):
        calls.append(None)
        return targets * math.nan if len(calls) == step else targets

    job = make_job()
    where = f"epoch {(step - 1) // STEPS + 1} step {(step - 1) % STEPS + 1}; start again"
    monkeypatch.setattr(loop, "_SETTLE_SECONDS", 1000)
    with pytest.raises(ConfigError, match=f"a finite loss, found nan in {where}"):
        fit(job, spoil)
    assert len(calls) == -(-step // STEPS) * STEPS and job.state.exists() == (step > STEPS)


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("holds", "fix"), [(5, "--batch-size 4, which fits"), (1, "--input-size")])
def test_batch_that_does_not_fit(holds, fix, make_job, fit):
    def full(images, targets):
        if len(images) > holds:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
            )
        return targets

    with pytest.raises(ConfigError, match=f"--batch-size 16: expected .*2.00 GiB.* give .*{fix}"):
        fit(make_job(), full)


def test_bits_do_not_depend_on_where_the_pictures_are(make_job, fit, tmp_path):
    kept, read = (
        weights(fit(make_job(epochs=1, out=tmp_path / name, data_on_device=name)))
        for name in ("yes", "no")
    )
    assert_same_bits(kept, read)


# ---- What a run leaves ---------------------------------------------------------------------------


def test_files_of_a_run(make_job, fit):
    job = make_job(epochs=2)
    path = fit(job)
    out = job.config.out
    assert path == out / "student.safetensors"
    assert {file.name for file in out.iterdir()} == {
        "student.safetensors",
        "last.pt",
        "config.json",
        "metrics.csv",
        "curves.png",
    }
    rows = history(out)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["learning_rate"] > rows[1]["learning_rate"] > 0
    assert set(rows[0]) >= {"loss", "accuracy", "macro_f1", "images_per_second"}
    Image.open(out / "curves.png").verify()

    config = json.loads((out / "config.json").read_text())
    assert (config["data"], config["seed"]) == (str(job.config.data), 0)
    assert (config["epochs"], config["loss"], config["input_size"]) == (2, "cross-entropy", 32)


def test_checkpoint_carries_spec_and_provenance(make_job, fit):
    job = make_job(epochs=1, select="last")
    model, spec = load_checkpoint(fit(job))
    assert spec == job.spec.replace(class_frequencies=spec.class_frequencies)
    assert spec.class_frequencies == pytest.approx([1 / 7] * 7)
    assert isinstance(model, EfficientFace)
    record = provenance(job.result)
    assert (record["kind"], record["dataset"], record["epoch"]) == ("student", "synthetic faces", 1)
    assert record["recipe"]["augmentation"] == "mild"
    assert record["recipe"]["select"] == record["select"] == "last"
    assert {"torch", "python", "efficientface_deploy"} == set(record["versions"])
    assert len(record["data_hash"]) == 64 and "calibration" not in record
    commit = record["git_commit"]
    assert commit is None or len(commit.rstrip("+")) == 40


@pytest.mark.parametrize(
    ("scores", "kept"), [((0.2, 0.8, 0.6), 2), ((0.8, 0.8, 0.2), 1), ((0.1, 0.2, 0.3), 3)]
)
def test_best_epoch_of_the_selection_is_kept(scores, kept, make_job, fit, monkeypatch):
    after_epoch = []

    def scripted(trainer, samples):
        right = round(10 * scores[len(after_epoch)])
        weights = trainer.eval_model.state_dict()
        after_epoch.append({name: value.clone() for name, value in weights.items()})
        labels = np.arange(10) % 7
        predicted = np.where(np.arange(10) < right, labels, (labels + 1) % 7)
        return np.eye(7, dtype=np.float32)[predicted], labels

    monkeypatch.setattr(loop.Trainer, "evaluate", scripted)
    path = fit(make_job(calibrate=False))
    assert provenance(path)["epoch"] == kept
    assert provenance(path)["metrics"]["accuracy"] == pytest.approx(scores[kept - 1])
    saved = weights(path)
    assert all(torch.equal(saved[name], after_epoch[kept - 1][name]) for name in saved)


def test_last_epoch_is_kept_without_a_selection(make_job, fit):
    job = make_job(epochs=2, select="last")
    path = fit(job)
    assert provenance(path)["epoch"] == 2
    assert "accuracy" not in history(job.config.out)[0]
    assert_same_bits(weights(path), torch.load(job.state, weights_only=True)["model"])


# ---- Moving average, calibration, precision ------------------------------------------------------


def test_moving_average_is_what_is_evaluated_and_kept(make_job, fit, monkeypatch):
    """w' = d * w' + (1 - d) * w after every step, where d grows from 2 / 11 to the decay."""
    seen = []
    step = torch.optim.SGD.step

    def spy(self, *arguments, **keywords):
        result = step(self, *arguments, **keywords)
        seen.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    path = fit(make_job(epochs=2, select="last", ema=0.3, learning_rate=0.05))
    average = seen[0]
    for count, weight in enumerate(seen[1:], start=1):
        decay = min(0.3, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(weights(path)["conv1.0.weight"], average)
    assert not torch.allclose(average, seen[-1], rtol=0.01)


def losses_of_an_epoch(make_job, fit, out: Path, **options) -> float:
    # Hardly any learning: batch norm over few values would blow differences of rounding up.
    job = make_job(epochs=1, out=out, select="last", learning_rate=1e-6, **options)
    assert weights(fit(job))["fc.weight"].dtype == torch.float32
    return history(out)[0]["loss"]


def test_mixed_precision_learns_the_same(make_job, fit, tmp_path):
    plain = losses_of_an_epoch(make_job, fit, tmp_path / "plain")
    mixed = losses_of_an_epoch(make_job, fit, tmp_path / "mixed", amp="bf16")
    assert mixed == pytest.approx(plain, rel=0.02) and mixed != plain


@pytest.mark.slow  # a minute and a half of compiling
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++; none is here")
def test_compiled_network_learns_the_same(make_job, fit, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain = losses_of_an_epoch(make_job, fit, tmp_path / "plain")
    compiled = losses_of_an_epoch(make_job, fit, tmp_path / "compiled", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-3)


# ---- The published recipe, step for step ---------------------------------------------------------


@pytest.mark.slow
def test_published_recipe_step_for_step(make_job, make_network, monkeypatch):
    """Twelve steps in float64 against the published formulas, written out here.

    Batch norm makes rounding grow up to tenfold in a step, in twenty to 3e-9 on one processor and
    to 2e-5 on another. So the formulas come to the loop's weights within 1e-8, every fourth
    step, and go on from those.
    """
    torch.manual_seed(1)
    teacher = make_network().double()  # any frozen network that tells its inputs apart
    changes = {"batch_size": 28, "select": "last", "epochs": 6}
    recipe = dataclasses.replace(published_student("rafdb"), **changes, step_epochs=2)
    job = dataclasses.replace(make_job(input_size=48), recipe=recipe)
    samples, _ = choose_samples(job, ALONE)
    images = TrainingImages(samples, job.spec, "published", 0)
    torch.manual_seed(0)
    model = EfficientFace(7).double()
    reference = copy.deepcopy(model).to(memory_format=torch.channels_last)

    losses, batches, answers, reached = [], [], [], []

    def ldg(batch, loaded):
        batches.append(batch)
        reached.append({name: value.clone() for name, value in model.state_dict().items()})
        with torch.no_grad():
            answers.append(teacher(batch))
        return answers[-1].softmax(dim=1)

    published = LOSSES["published"]

    def recorded(logits, distribution):
        losses.append(published(logits, distribution))
        return losses[-1]

    monkeypatch.setitem(LOSSES, "published", recorded)
    train(job, model, images, [], ldg, ALONE)
    assert len(losses) == 12  # 56 images in batches of 28, six epochs

    momenta: dict[str, torch.Tensor] = {}
    expected = []
    reference.train()
    for step, (batch, answer) in enumerate(zip(batches, answers, strict=True)):
        if step % 4 == 0:
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(value, reached[step][name], rtol=0, atol=1e-8)
            reference.load_state_dict(reached[step])
        target = torch.exp(answer - answer.logsumexp(dim=1, keepdim=True))
        logits = reference(batch)
        log_probabilities = logits - logits.logsumexp(dim=1, keepdim=True)
        loss = -(target * log_probabilities).sum() / (28 * 7)  # the mean over batch and classes
        expected.append(loss.item())
        reference.zero_grad()
        loss.backward()
        rate = 0.1 * 0.1 ** (step // 4)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                gradient = parameter.grad + 1e-4 * parameter
                momenta[name] = 0.9 * momenta[name] + gradient if name in momenta else gradient
                parameter -= rate * momenta[name]
    found = [loss.item() for loss in losses]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert not torch.equal(reached[0]["conv1.0.weight"], reached[-1]["conv1.0.weight"])
    assert max(found) - min(found) > 1e-3


def test_weights_that_a_step_has_spoilt_are_not_saved(make_job, fit, monkeypatch):
    """The loss was finite; the weights after the step are not, and the next loss would say so."""
    job = make_job(epochs=2, save_minutes=0)
    step = loop.Trainer.train_step

    def spoil(trainer, batch, state):
        loss = step(trainer, batch, state)
        if state.epoch == 1:
            next(trainer.step.model.parameters()).data[0] = math.nan
        return loss

    monkeypatch.setattr(loop.Trainer, "train_step", spoil)
    with pytest.raises(ConfigError, match=r"finite weights, found NaN .*in a new --out") as caught:
        fit(job)
    assert "is the best epoch before" in str(caught.value)
    state = torch.load(job.state, weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["model"].values())
