from __future__ import annotations

import pytest

from benchmarks.measure.trainings import subset, train
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.workbench.dataset import read_dataset


@pytest.fixture(scope="module")
def faces(prepare_faces):
    return prepare_faces(70)


def test_subset_is_a_data_set_of_its_own(faces, tmp_path):
    dataset = read_dataset(faces)
    chosen = dataset.split("train")[3:60:4]
    subset(dataset, chosen, tmp_path / "few")
    few = read_dataset(tmp_path / "few").split("train")
    assert [(s.path.name, s.label) for s in few] == [(s.path.name, s.label) for s in chosen]


def test_own_names_fit_no_last_layer(faces, tmp_path):
    dataset = read_dataset(faces)
    subset(dataset, dataset.split("train")[:30], tmp_path / "own", own_names=True)
    own = read_dataset(tmp_path / "own")
    assert own.labels == tuple(f"my {label}" for label in dataset.labels)


def test_training_that_fails_is_named(faces, tmp_path):
    dataset = read_dataset(faces)
    with pytest.raises(ConfigError, match=r"-m training.student .* found exit status 2; see its e"):
        train(tmp_path, dataset, dataset.split("train"), "--schedule", "none")
    assert not (tmp_path / "done").exists()
