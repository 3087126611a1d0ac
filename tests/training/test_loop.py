from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientface_deploy.artifact import PROVENANCE_KEY, read_safetensors_metadata
from efficientface_deploy.errors import CheckpointError, ConfigError, DatasetError
from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.models.checkpoint import read_weights
from efficientface_deploy.preprocess import normalise, to_model_input
from training import loop
from training.loop import InterruptError, Job, Recipe, choose_device, labels_as_targets, predict

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3  # 56 images, 7 held out, batches of 16


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


class Stopping:
    """Targets from the labels until a step at which the user presses Ctrl-C."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.at:
            raise KeyboardInterrupt
        return labels_as_targets(images, targets)


# ---- Learning ------------------------------------------------------------------------------------


def test_training_tells_two_expressions_apart(make_job, fit):
    """Sixteen faces that show Surprise or Disgust; guessing among the two costs log 2."""
    job = make_job(epochs=20, batch_size=8, input_size=64, select="last")
    two = [sample for sample in job.dataset.split("train") if sample.label in (3, 5)]
    dataset = dataclasses.replace(job.dataset, samples={"train": tuple(two)})
    fit(dataclasses.replace(job, dataset=dataset))
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


def test_votes_reach_the_loss(make_job, fit):
    seen = []

    def teach(images, targets):
        seen.append(targets)
        return targets

    fit(make_job(epochs=1, votes=True), teach)
    assert ((torch.cat(seen) > 0) & (torch.cat(seen) < 1)).any()


def test_loss_that_is_not_finite_stops_the_training(make_job, fit):
    job = make_job(learning_rate=1e30)
    with pytest.raises(
        ConfigError, match=r"learning rate 1e\+30: expected a finite loss, found nan"
    ):
        fit(job)
    assert not job.result.exists()


def test_predict_uses_the_runtimes_preprocessing(make_job, make_network):
    job = make_job(input_size=64)
    model = make_network().train()
    samples = job.dataset.split("test")
    predicted, labels = predict(model, samples, job.spec, torch.device("cpu"))
    images = np.stack([to_model_input(sample.path, job.spec) for sample in samples])
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(normalise(images, job.spec))).argmax(dim=1)
    np.testing.assert_array_equal(predicted, expected.numpy())
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
    assert record["recipe"]["augmentation"] == "default"
    assert record["config"]["select"] == record["select"] == "last"
    assert {"torch", "python", "efficientface_deploy"} == set(record["versions"])


@pytest.mark.parametrize(
    ("scores", "kept"), [((0.2, 0.8, 0.6), 2), ((0.8, 0.8, 0.2), 1), ((0.1, 0.2, 0.3), 3)]
)
def test_best_epoch_of_the_selection_is_kept(scores, kept, make_job, fit, monkeypatch):
    after_epoch = []

    def scripted(model, samples, spec, device):
        right = round(10 * scores[len(after_epoch)])
        after_epoch.append({name: value.clone() for name, value in model.state_dict().items()})
        labels = np.arange(10) % 7
        return np.where(np.arange(10) < right, labels, (labels + 1) % 7), labels

    monkeypatch.setattr(loop, "predict", scripted)
    path = fit(make_job())
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
    rest, held = loop.choose_samples(make_job(select="holdout"))
    assert set(rest) | set(held) == train and len(held) == 7
    rest, chosen = loop.choose_samples(make_job(select="test"))
    assert set(rest) == train and chosen == list(make_job().dataset.split("test"))
    assert loop.choose_samples(make_job(select="last")) == (rest, [])
    with pytest.raises(DatasetError, match="a validation split"):
        loop.choose_samples(make_job(select="validation"))


# ---- Interrupts and --resume ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder for one uninterrupted run that several tests look at; made by the first."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def whole(make_job, fit, finished) -> Job:
    """A finished job of three epochs."""
    job = make_job(out=finished)
    if not finished.exists():
        fit(job)
    return job


@pytest.mark.parametrize("stop_at", [STEPS, STEPS + 2, 2 * STEPS + 1])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(stop_at, make_job, fit, whole):
    broken = make_job()
    with pytest.raises(InterruptError, match="expected 3 epochs, found an interrupt; add --resume"):
        fit(broken, Stopping(stop_at))
    assert len(history(broken.config.out)) == stop_at // STEPS
    fit(make_job(resume=True))

    assert_same_bits(weights(broken.result), weights(whole.result))
    ours, theirs = (torch.load(job.state, weights_only=True) for job in (broken, whole))
    assert_same_bits(ours["model"], theirs["model"])
    buffers = (state["optimizer"]["state"] for state in (ours, theirs))
    for one, other in zip(*(buffer.values() for buffer in buffers), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    for one, other in zip(ours["history"], theirs["history"], strict=True):
        assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}


def test_interrupt_before_the_first_epoch_is_over(make_job, fit):
    with pytest.raises(InterruptError, match="no epoch was finished: start again") as caught:
        fit(make_job(epochs=1), Stopping(2))
    assert caught.value.exit_code == 130
    fit(make_job(epochs=1))  # in the same folder


def test_kill_between_weights_and_state_costs_one_epoch(make_job, fit, monkeypatch, whole):
    broken = make_job()
    save, saved = loop._save_state, []

    def killed_at_the_second(*arguments):
        if len(saved) == 1:
            raise SystemExit
        saved.append(save(*arguments))

    monkeypatch.setattr(loop, "_save_state", killed_at_the_second)
    with pytest.raises(SystemExit):
        fit(broken)
    monkeypatch.undo()
    fit(make_job(resume=True))
    assert_same_bits(weights(broken.result), weights(whole.result))


def test_finished_run_has_nothing_left_to_do(make_job, fit):
    job = make_job(epochs=1)
    before = fit(job).read_bytes()
    assert fit(make_job(epochs=1, resume=True), Stopping(0)).read_bytes() == before


def test_folder_of_another_run_is_refused(make_job, fit):
    job = make_job(epochs=1)
    before = fit(job).read_bytes()
    with pytest.raises(ConfigError, match="another run; choose another --out, or add --resume"):
        fit(job)
    job.state.unlink()  # the weights alone are worth as much
    with pytest.raises(ConfigError, match="another run; choose another --out, or remove it"):
        fit(job)
    assert job.result.read_bytes() == before


def test_resume_without_a_run(make_job, fit):
    job = make_job(resume=True)
    with pytest.raises(CheckpointError, match=r"last\.pt: .* found none; leave --resume out"):
        fit(job)
    assert not job.config.out.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"epochs": 2}, "epochs"),
        ({"learning_rate": 0.2}, "learning_rate"),
        ({"loss": "published"}, "loss"),
        ({"select": "last"}, "select"),
        ({"input_size": 48}, "input_size, spec"),
        ({"init": Path("other.pth.tar")}, "init"),
    ],
)
def test_resume_with_other_options_is_refused(change, named, make_job, fit, whole):
    with pytest.raises(ConfigError, match=f"others for {named}; repeat those in .*config.json"):
        fit(make_job(**{"out": whole.config.out, "resume": True} | change))


def test_run_may_move_and_change_its_workers(make_job, fit, whole, tmp_path):
    shutil.copytree(whole.config.out, tmp_path / "moved")
    fit(make_job(out=tmp_path / "moved", resume=True, workers=1, device="cpu"))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other"])
def test_damaged_state_is_reported(damage, make_job, fit, whole):
    job = make_job(resume=True)
    shutil.copytree(whole.config.out, job.config.out)
    data = {"truncated": job.state.read_bytes()[:5000], "text": b"weights", "empty": b""}
    if damage == "other":
        torch.save({"weights": torch.zeros(2)}, job.state)
    else:
        job.state.write_bytes(data[damage])
    with pytest.raises(CheckpointError, match=r"last\.pt: .* damaged file .* new folder"):
        fit(job)


def test_ctrl_c_in_a_terminal(face_set, tmp_path):
    """The signal goes to the whole process group, as a terminal sends it."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "training.student", "--data", str(face_set), "--out", str(out)]
    command += ["--targets", "onehot", "--input-size", "32", "--batch-size", "8", "--epochs", "500"]
    command += ["--workers", "0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not (out / "last.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert stderr.startswith(f"error: {out}: expected 500 epochs, found an interrupt; add --resume")
    assert stderr.count("\n") == 1 and "Traceback" not in stdout
    torch.load(out / "last.pt", weights_only=True)
    load_checkpoint(out / "student.safetensors")
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


# ---- Recipes -------------------------------------------------------------------------------------


def recipe(**changes) -> Recipe:
    return Recipe(
        **{
            "epochs": 10,
            "batch_size": 8,
            "learning_rate": 0.2,
            "weight_decay": 1e-4,
            "schedule": "one-cycle",
            "loss": "published",
            "augmentation": "published",
        }
        | changes
    )


def test_one_cycle():
    one_cycle = recipe()
    assert one_cycle.learning_rate_at(0) == pytest.approx(0.04 * 0.2)
    assert one_cycle.learning_rate_at(2) == pytest.approx(0.2)  # a fifth of ten epochs
    assert one_cycle.learning_rate_at(6) == pytest.approx(0.1)  # half of the cosine
    assert one_cycle.learning_rate_at(10) == pytest.approx(0, abs=1e-12)
    slopes = np.diff([one_cycle.learning_rate_at(step / 50) for step in range(501)])
    assert (slopes[:100] > 0).all() and (slopes[100:] < 0).all()
    assert abs(slopes).max() < 0.003  # no jump


def test_steps():
    steps = recipe(schedule="step", step_epochs=3, decay=0.5)
    rates = [steps.learning_rate_at(at) for at in (0, 2.99, 3, 5.99, 6, 9.5)]
    assert rates == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05, 0.025])


def test_optimizer_is_sgd_over_all_parameters():
    model = EfficientFace(7)
    optimizer = recipe(nesterov=True).optimizer(model)
    assert type(optimizer) is torch.optim.SGD and len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    settings = [group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")]
    assert settings == [0.2, 0.9, 1e-4, True]
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in model.parameters())


def test_schedule_reaches_the_optimizer(make_job, fit, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *arguments, **keywords):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    job = make_job(epochs=2, select="last")
    fit(job)
    expected = [job.recipe.learning_rate_at(step / STEPS) for step in range(2 * STEPS)]
    assert rates == pytest.approx(expected)


def test_options_change_the_recipe(make_job):
    config = make_job().config
    assert config.change(recipe()) == recipe()
    given = dataclasses.replace(config, epochs=4, learning_rate=0.0)
    assert given.change(recipe()) == recipe(epochs=4, learning_rate=0.0)


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda: expected a CUDA device, found none"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
