"""A small prepared data set and short trainings, shared by the tests of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from efficientface_deploy.dataset import read_dataset
from efficientface_deploy.models import EfficientFace, save_checkpoint
from training import prepare
from training.loop import Job, Recipe, Teach, TrainConfig, labels_as_targets, train

RECIPE = Recipe(
    epochs=3,
    batch_size=16,
    learning_rate=0.02,
    weight_decay=5e-4,
    schedule="one-cycle",
    loss="cross-entropy",
    augmentation="default",
    nesterov=True,
)


@pytest.fixture(scope="session")
def face_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared synthetic faces: eight of each class to train on, four to test."""
    out = tmp_path_factory.mktemp("data") / "faces"
    arguments = ["synthetic", "--train", "56", "--test", "28", "--size", "48", "--out", str(out)]
    assert prepare.main(arguments) == 0
    return out


@pytest.fixture(scope="session")
def student_file(
    face_set: Path,
    make_network: Callable[..., EfficientFace],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Checkpoint of a lively network for the data set."""
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_checkpoint(path, make_network(), read_dataset(face_set).spec.replace(input_size=64))
    return path


@pytest.fixture
def make_job(face_set: Path, tmp_path: Path) -> Callable[..., Job]:
    """A student's job; keywords change its recipe, its options, or ``votes``."""

    def make(**changes: Any) -> Job:
        changes = {"out": tmp_path / "run", "input_size": 32, "workers": 0} | changes
        votes = changes.pop("votes", False)
        of_recipe = {field.name for field in dataclasses.fields(Recipe)} & set(changes)
        recipe = dataclasses.replace(RECIPE, **{name: changes.pop(name) for name in of_recipe})
        config = TrainConfig(data=face_set, **changes)
        dataset = read_dataset(face_set)
        spec = config.model_spec(dataset, "efficientface")
        return Job("student", spec, recipe, dataset, config, votes)

    return make


@pytest.fixture
def fit() -> Callable[..., Path]:
    """Do a job with a fresh EfficientFace."""

    def fit(job: Job, teach: Teach = labels_as_targets) -> Path:
        torch.manual_seed(job.config.seed)
        return train(job, EfficientFace(job.spec.num_classes), teach, torch.device("cpu"))

    return fit
