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
from training.data import AUGMENTATIONS, TrainingImages
from training.loop import choose_samples, train
from training.parallel import Ranks
from training.recipe import Recipe
from training.run import Job, TrainConfig
from training.targets import Teach, own_targets

RECIPE = Recipe(
    epochs=3,
    batch_size=16,
    learning_rate=0.02,
    weight_decay=5e-4,
    schedule="one-cycle",
    loss="cross-entropy",
    augmentation="mild",
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
        changes = {"tensorboard": False} | changes
        votes = changes.pop("votes", False)
        options = {field.name for field in dataclasses.fields(TrainConfig)}
        of_recipe = {name: changes.pop(name) for name in set(changes) - options}
        config = TrainConfig(data=face_set, **changes)
        recipe = config.change(dataclasses.replace(RECIPE, **of_recipe))
        dataset = read_dataset(face_set)
        spec = config.model_spec(dataset, "efficientface")
        return Job("student", spec, recipe, dataset, config, votes)

    return make


@pytest.fixture
def fit() -> Callable[..., Path]:
    """Do a job with a fresh EfficientFace."""

    def fit(job: Job, teach: Teach = own_targets) -> Path:
        samples, selection = choose_samples(job)
        augmentation = AUGMENTATIONS[job.recipe.augmentation](job.spec)
        images = TrainingImages(samples, job.spec, augmentation, job.config.seed, votes=job.votes)
        torch.manual_seed(job.config.seed)
        model = EfficientFace(job.spec.num_classes)
        train(job, model, images, selection, teach, Ranks(torch.device("cpu")))
        return job.result

    return fit
