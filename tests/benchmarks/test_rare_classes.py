from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import rare_classes as bench
from efficientface_deploy.workbench.dataset import read_dataset


@pytest.fixture(scope="module")
def faces(prepare_faces):
    return prepare_faces(147)


def test_every_picture_is_in_one_fold_and_every_class_in_each(faces):
    samples = read_dataset(faces).split("train")
    parts = bench.folds(samples, 3, 0)
    assert sorted(sample.path for part in parts for sample in part) == sorted(
        sample.path for sample in samples
    )
    assert [len(part) for part in parts] == [49, 49, 49]
    assert all(np.bincount([s.label for s in part]).tolist() == [7] * 7 for part in parts)
    assert bench.folds(samples, 3, 0) == parts != bench.folds(samples, 3, 1)


def test_strength_moves_labels_to_the_rare_class():
    """96 pictures of a class that is said of all, 4 of a rare one that is said 10 % as loudly."""
    labels = np.array([0] * 96 + [1] * 4)
    frequencies = np.tile(np.array([0.96, 0.04], np.float32), (100, 1))
    logits = np.log(np.tile(np.array([0.99, 0.01], np.float32), (100, 1)))
    logits[96:] = np.log([0.9, 0.1])
    rows = [bench.row(labels, logits, frequencies, s, ("often", "seldom")) for s in (0, 0.5, 1)]
    assert [row["seldom, 4 images"] for row in rows] == [0, 0, 1]
    assert [row["accuracy"] for row in rows] == [0.96, 0.96, 1]
    assert not any(key.startswith("often") for row in rows for key in row)
    low, high = rows[0]["seldom, 4 images_interval"]
    assert low == 0 and 0.3 < high < 0.7


@pytest.mark.slow
def test_the_command_trains_each_fold(faces, tmp_path):
    arguments = ["--data", str(faces), "--targets", "onehot", "--folds", "2", "--epochs", "1"]
    arguments += ["--input-size", "32", "--work", str(tmp_path / "work")]
    assert bench.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out/rare.json").read_text())
    assert [row["strength"] for row in result["rows"]] == list(bench.STRENGTHS)
    assert result["data"]["images"] == 147
    assert all(0 <= row["accuracy"] <= 1 for row in result["rows"])
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"fold-0", "fold-1"}
