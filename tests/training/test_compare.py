"""Comparing trainings: what differs, how good each is, and what it took."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ConfigError, DatasetError
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.workbench.dataset import read_dataset
from efficientface_deploy.workbench.evaluation import predict
from training import compare, student
from training.compare import read_run
from training.evaluate import score
from training.trainer.inference import infer_with
from training.trainer.label_store import STORE, seconds_per_view
from training.trainer.loader import hold_out


@pytest.fixture(scope="module")
def runs(face_set, teacher_file, tmp_path_factory) -> Path:
    """Folder of four short trainings: onehot, mild, ldg, and one on all images."""
    root = tmp_path_factory.mktemp("runs")
    common = ["--data", str(face_set), "--input-size", "32", "--epochs", "2", "--workers", "0"]
    common += ["--batch-size", "16", "--no-tensorboard"]
    own = ["--targets", "onehot"]
    options = {
        "onehot": own,
        "mild": [*own, "--augmentation", "mild"],
        "ldg": ["--teacher", str(teacher_file), "--views", "2"],
        "all": [*own, "--select", "last"],
        "steps": [*own, "--schedule", "step", "--step-epochs", "1"],
    }
    for name, given in options.items():
        assert student.main([*common, *given, "--out", str(root / name)]) == 0
    return root


@pytest.fixture
def run_compare(runs, face_set, tmp_path) -> Callable[..., list[dict]]:
    def run(*names: str, options: tuple[str, ...] = ()) -> list[dict]:
        out = tmp_path / "out"
        folders = [str(runs / name) for name in names]
        arguments = [*folders, "--data", str(face_set), *options, "--out", str(out)]
        assert compare.main(arguments) == 0
        written = json.loads((out / "comparison.json").read_text())
        assert written["dataset"] == "synthetic faces" and "torch" in written["versions"]
        assert written["split"] == ("test" if "test" in options else "holdout")
        return written["runs"]

    return run


def test_class_without_images_is_named(runs, face_set, tmp_path, capsys):
    data = shutil.copytree(face_set, tmp_path / "faces")
    lines = (data / "manifest.csv").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("test/6/")]
    (data / "manifest.csv").write_text("\n".join(kept))
    arguments = [str(runs / "onehot"), str(runs / "mild"), "--data", str(data), "--split", "test"]
    assert compare.main(arguments) == 0
    assert "synthetic faces, test, none of Anger. In brackets" in capsys.readouterr().out


def test_options_without_effect_are_left_out(run_compare):
    cycle, steps = (row["options"] for row in run_compare("onehot", "steps"))
    assert cycle == {"schedule": "one-cycle"}
    assert steps == {"schedule": "step", "step_epochs": 1}


def test_rows_name_what_differs_and_score_the_holdout(run_compare, runs, face_set, tmp_path):
    rows = run_compare("onehot", "mild", "ldg")
    assert [row["run"] for row in rows] == ["onehot", "mild", "ldg"]
    assert rows[0]["options"].keys() == {"augmentation", "targets", "teacher", "views"}
    assert [row["options"]["augmentation"] for row in rows] == ["strong", "mild", "strong"]

    dataset = read_dataset(face_set)
    samples = hold_out(dataset.split("train"), 0)[1]
    answers = []
    for row in rows:
        model, spec = load_checkpoint(runs / row["run"] / "student.safetensors")
        logits = predict(infer_with(model, spec, torch.device("cpu")), samples, spec)
        labels = [sample.label for sample in samples]
        probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
        expected = score(probabilities, samples, dataset.labels)
        for key in ("accuracy", "accuracy_interval", "macro_f1", "expected_calibration_error"):
            assert row[key] == pytest.approx(expected[key], abs=1e-6)
        answers.append(np.equal(probabilities.argmax(axis=1), labels))
    for row, right in zip(rows, answers, strict=True):
        assert row["difference"] == pytest.approx(right.mean() - answers[0].mean())
        low, high = row["difference_interval"]
        assert low <= row["difference"] <= high

    page = (tmp_path / "out/comparison.md").read_text()
    assert page.count("\n| ") == 3 and "| run | options | accuracy, %" in page
    assert "| - |" in page.splitlines()[2]
    onehot, mild, ldg = (line.split(" | ")[1] for line in page.splitlines()[2:5])
    assert onehot == "--augmentation strong --targets onehot no --teacher --views 0"
    assert mild == "--augmentation mild"
    assert re.fullmatch(r"--targets ldg --teacher \S+/teacher\.safetensors --views 2", ldg)


def test_time_is_that_of_the_steps_and_of_the_store(run_compare, runs):
    rows = run_compare("onehot", "ldg")
    images = 56 - 7  # one of each class is held out; whole batches of 16 are 48
    history = read_run(runs / "ldg").history
    assert len(history) == 2 and rows[1]["epochs_done"] == 2
    expected = sum(images // 16 * 16 / row["images_per_second"] for row in history)
    assert rows[1]["training_seconds"] == pytest.approx(expected)
    assert rows[0]["store_seconds"] == 0
    seconds = seconds_per_view(runs / "ldg" / STORE)
    assert len(seconds) == 2
    assert rows[1]["store_seconds"] == pytest.approx(sum(seconds))


def test_a_store_that_is_gone_costs_nobody_knows_what(runs, tmp_path):
    shutil.copytree(runs / "ldg", tmp_path / "ldg")
    (tmp_path / "ldg" / STORE).unlink()
    assert read_run(tmp_path / "ldg").store_seconds() is None


def test_other_images_than_the_tenth(run_compare, face_set, runs):
    with pytest.raises(ConfigError, match="expected --select holdout, so that none was trained"):
        run_compare("onehot", "all")
    rows = run_compare("onehot", "all", options=("--split", "test"))
    assert [row["options"]["select"] for row in rows] == ["holdout", "last"]
    with pytest.raises(DatasetError, match="a validation split"):
        run_compare("onehot", options=("--split", "validation"))


@pytest.mark.parametrize("damage", ["missing", "empty", "settings", "figures", "weights"])
def test_what_is_no_training_is_named(damage, runs, face_set, tmp_path, capsys):
    folder = tmp_path / "run"
    if damage != "missing":
        shutil.copytree(runs / "onehot", folder)
    if damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    if damage == "settings":
        (folder / "config.json").write_text("[]")
    if damage == "figures":
        (folder / "metrics.csv").write_text("epoch,loss\n1,much\n")
    if damage == "weights":
        (folder / "student.safetensors").unlink()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: compare.main([str(folder), "--data", str(face_set)]))
    assert end.value.code == 2
    assert f"{folder}: expected the folder of a training" in capsys.readouterr().err


def test_a_file_without_times_has_none(runs):
    assert seconds_per_view(runs / "onehot" / "student.safetensors") == []


def test_options_are_shown_as_they_are_typed():
    shown = {
        ("seed", 0): "--seed 0",
        ("tensorboard", False): "--no-tensorboard",
        ("channels_last", True): "--channels-last",
        ("preliminary", False): "no --preliminary",  # --no-preliminary is no option
        ("preliminary", True): "--preliminary",
        ("teacher", None): "no --teacher",
    }
    assert {pair: compare._as_option(*pair) for pair in shown} == shown
