from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientface_deploy.artifact import PROVENANCE_KEY, read_safetensors_metadata
from efficientface_deploy.errors import ConfigError, DatasetError
from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.models.checkpoint import read_weights
from efficientface_deploy.vision.preprocess import normalise, to_model_input
from training.trainer import loop, temperature
from training.trainer.augmentation import AUGMENTATIONS
from training.trainer.distributed import Ranks
from training.trainer.loader import TrainingImages, choose_samples
from training.trainer.loop import check_amp, train
from training.trainer.recipe import published_student
from training.trainer.targets import LOSSES, own_targets
from training.trainer.temperature import predict

ALONE = Ranks(torch.device("cpu"))

STEPS = 3  # 56 images, 7 held out, batches of 16
CPU = Ranks(torch.device("cpu"))


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


def test_training_tells_two_expressions_apart(make_job, fit):
    """Sixteen faces that show Surprise or Disgust; guessing among the two costs log 2."""
    job = make_job(epochs=20, batch_size=8, input_size=48, select="last")
    two = [sample for sample in job.dataset.split("train") if sample.label in (3, 5)]
    images = TrainingImages(two, job.spec, AUGMENTATIONS["mild"](job.spec), 0)
    torch.manual_seed(0)
    train(job, EfficientFace(7), images, [], own_targets, CPU)
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

    def teach(images, targets):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.shape == (16, 3, 32, 32) and targets.shape == (16, 7)
        seen.extend(image.numpy().tobytes() for image in images)
        return targets

    fit(make_job(epochs=2), teach)
    assert len(seen) == len(set(seen)) == 2 * STEPS * 16  # no picture twice in two epochs


def test_schedule_reaches_the_optimizer(make_job, fit, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *arguments, **keywords):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    job = make_job(epochs=2, select="last")
    fit(job)
    expected = [job.recipe.learning_rate_at(step / 3) for step in range(2 * 3)]
    assert rates == pytest.approx(expected)


def test_votes_reach_the_loss(make_job, fit):
    seen = []

    def teach(images, targets):
        seen.append(targets)
        return targets

    fit(make_job(epochs=1), teach, votes=True)
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


def test_predict_uses_the_runtimes_preprocessing(make_job, make_network):
    job = make_job(input_size=64)
    model = make_network().train()
    samples = job.dataset.split("test")
    logits, labels = predict(model, samples, job.spec, torch.device("cpu"))
    images = np.stack([to_model_input(sample.path, job.spec) for sample in samples])
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(normalise(images, job.spec)))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(labels, [sample.label for sample in samples])


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
    assert spec == job.spec and isinstance(model, EfficientFace)
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

    def scripted(model, samples, spec, device):
        right = round(10 * scores[len(after_epoch)])
        after_epoch.append({name: value.clone() for name, value in model.state_dict().items()})
        labels = np.arange(10) % 7
        predicted = np.where(np.arange(10) < right, labels, (labels + 1) % 7)
        return np.eye(7, dtype=np.float32)[predicted], labels

    monkeypatch.setattr(loop, "predict", scripted)
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


def test_selection_decides_what_is_trained_on(make_job):
    train = set(make_job().dataset.split("train"))
    rest, held = choose_samples(make_job(select="holdout"), ALONE)
    assert set(rest) | set(held) == train and len(held) == 7
    rest, chosen = choose_samples(make_job(select="test"), ALONE)
    assert set(rest) == train and chosen == list(make_job().dataset.split("test"))
    assert choose_samples(make_job(select="last"), ALONE) == (rest, [])
    with pytest.raises(DatasetError, match="a validation split"):
        choose_samples(make_job(select="validation"), ALONE)


def test_class_without_images_is_named(make_job):
    job = make_job(select="last")
    without = tuple(s for s in job.dataset.split("train") if s.label not in (2, 5))
    dataset = dataclasses.replace(job.dataset, samples={"train": without})
    with pytest.raises(ConfigError, match="of every class, found none of Sadness, Disgust; add"):
        choose_samples(dataclasses.replace(job, dataset=dataset), ALONE)


# ---- Moving average, calibration, precision ------------------------------------------------------


def test_moving_average_is_what_is_judged_and_kept(make_job, fit, monkeypatch):
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


def test_temperature_ends_up_in_the_weights_of_a_student(make_job, fit):
    job = make_job(epochs=1, learning_rate=0.1)
    before = fit(dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, calibrate=False)))
    plain = weights(before)
    shutil.rmtree(job.config.out)
    after = weights(fit(job))
    record = provenance(job.result)["calibration"]
    assert record["folded"] and record["images"] == 7 and record["temperature"] != 1
    assert record["ece_after"] < record["ece_before"]
    for name in ("fc.weight", "fc.bias"):
        torch.testing.assert_close(after.pop(name) * record["temperature"], plain.pop(name))
    assert_same_bits(after, plain)


def test_teacher_keeps_temperature_one(make_job, fit):
    job = dataclasses.replace(make_job(epochs=1), kind="teacher")
    fit(job)
    record = provenance(job.result)["calibration"]
    assert not record["folded"] and record["temperature"] > 0
    assert_same_bits(weights(job.result), torch.load(job.state, weights_only=True)["model"])


def losses_of_an_epoch(make_job, fit, out: Path, **options) -> float:
    # Hardly any learning: batch norm over few values would blow differences of rounding up.
    job = make_job(epochs=1, out=out, select="last", learning_rate=1e-6, **options)
    assert weights(fit(job))["fc.weight"].dtype == torch.float32
    return history(out)[0]["loss"]


def test_mixed_precision_learns_the_same(make_job, fit, tmp_path):
    plain = losses_of_an_epoch(make_job, fit, tmp_path / "plain")
    mixed = losses_of_an_epoch(make_job, fit, tmp_path / "mixed", amp="bf16")
    assert mixed == pytest.approx(plain, rel=0.02) and mixed != plain


def test_fp16_needs_a_gpu():
    check_amp("--amp", "fp16", torch.device("cuda"))
    with pytest.raises(ConfigError, match="--amp fp16: expected a CUDA device, found a CPU"):
        check_amp("--amp", "fp16", torch.device("cpu"))


@pytest.mark.slow  # a minute and a half of compiling
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++; none is here")
def test_compiled_network_learns_the_same(make_job, fit, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain = losses_of_an_epoch(make_job, fit, tmp_path / "plain")
    compiled = losses_of_an_epoch(make_job, fit, tmp_path / "compiled", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_tensorboard_has_scalars_and_the_views(make_job, fit):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(epochs=2, tensorboard=True)
    fit(job)
    events = EventAccumulator(str(job.config.out / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"loss", "accuracy", "macro_f1", "learning_rate"}
    written = [event.value for event in events.Scalars("loss")]
    assert written == pytest.approx([row["loss"] for row in history(job.config.out)])
    with Image.open(io.BytesIO(events.Images("views")[0].encoded_image_string)) as sheet:
        assert sheet.width > 8 * 32


# ---- The published recipe, step for step ---------------------------------------------------------


def test_published_recipe_step_for_step(make_job, make_network, monkeypatch):
    """Twenty steps in float64 against the published formulas, written out here.

    Batch norm makes rounding grow up to tenfold in a step, to 3e-9 after twenty on one processor
    and to 2e-5 on another. So the formulas come to the loop's weights within 1e-8, every fourth
    step, and go on from those.
    """
    torch.manual_seed(1)
    teacher = make_network().double()  # any frozen network that tells its inputs apart
    changes = {"batch_size": 28, "select": "last", "epochs": 10}
    recipe = dataclasses.replace(published_student("rafdb"), **changes, step_epochs=4)
    job = dataclasses.replace(make_job(input_size=48), recipe=recipe)
    samples, _ = choose_samples(job, ALONE)
    images = TrainingImages(samples, job.spec, AUGMENTATIONS["published"](job.spec), 0)
    torch.manual_seed(0)
    model = EfficientFace(7).double()
    reference = copy.deepcopy(model).to(memory_format=torch.channels_last)

    losses, batches, reached = [], [], []

    def teach(batch, own):
        batches.append(batch)
        reached.append({name: value.clone() for name, value in model.state_dict().items()})
        with torch.no_grad():
            return teacher(batch).softmax(dim=1)

    published = LOSSES["published"]

    def recorded(logits, distribution):
        losses.append(published(logits, distribution))
        return losses[-1]

    monkeypatch.setitem(LOSSES, "published", recorded)
    train(job, model, images, [], teach, CPU)
    assert len(losses) == 20  # 56 images in batches of 28, ten epochs

    momenta: dict[str, torch.Tensor] = {}
    expected = []
    reference.train()
    for step, batch in enumerate(batches):
        if step % 4 == 0:
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(value, reached[step][name], rtol=0, atol=1e-8)
            reference.load_state_dict(reached[step])
        with torch.no_grad():
            target = torch.exp(teacher(batch) - teacher(batch).logsumexp(dim=1, keepdim=True))
        logits = reference(batch)
        log_probabilities = logits - logits.logsumexp(dim=1, keepdim=True)
        loss = -(target * log_probabilities).sum() / (28 * 7)  # the mean over batch and classes
        expected.append(loss.item())
        reference.zero_grad()
        loss.backward()
        rate = 0.1 * 0.1 ** (step // 8)
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

    def spoil(trainer, images, targets, progress):
        loss = step(trainer, images, targets, progress)
        if progress.epoch == 1:
            next(trainer.model.parameters()).data[0] = math.nan
        return loss

    monkeypatch.setattr(loop.Trainer, "train_step", spoil)
    with pytest.raises(ConfigError, match=r"finite weights, found NaN .*in a new --out") as caught:
        fit(job)
    assert "is the best epoch before" in str(caught.value)
    state = torch.load(job.state, weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_perfect_holdout_gives_no_temperature(make_job, fit, monkeypatch, capsys):
    """Its cross-entropy falls for ever: dividing by the limit would make every answer certain."""
    job = make_job(epochs=1, select="holdout", calibrate=True)
    logits = 5 * np.eye(7, dtype=np.float32)
    monkeypatch.setattr(temperature, "predict", lambda *_: (logits, np.arange(7)))
    before = {}
    fold = temperature.fold_temperature
    monkeypatch.setattr(
        temperature, "fold_temperature", lambda model, t: before.update(t=t) or fold(model, t)
    )
    fit(job)
    assert before["t"] == 1
    assert (
        "all 7 images of holdout are told right, which gives no temperature"
        in capsys.readouterr().out
    )
