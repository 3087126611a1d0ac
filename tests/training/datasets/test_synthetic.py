from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.spec import preset
from efficientface_deploy.workbench.dataset import label_distributions, read_dataset
from training import prepare
from training.datasets.face_renderer import LABELS, render_face


def synthetic(out: Path, *options: str) -> None:
    arguments = ["synthetic", "--train", "14", "--test", "7", "--size", "32", *options]
    assert prepare.main([*arguments, "--out", str(out)]) == 0


def test_synthetic_faces_are_in_the_layout_of_rafdb(tmp_path):
    synthetic(tmp_path / "faces")
    dataset = read_dataset(tmp_path / "faces")
    assert dataset.labels == LABELS == preset("rafdb").labels
    assert {name: len(samples) for name, samples in dataset.samples.items()} == {
        "train": 14,
        "validation": 0,
        "test": 7,
    }
    assert Counter(sample.label for sample in dataset.split("train")) == dict.fromkeys(range(7), 2)
    for sample in dataset.split("test"):
        assert sample.path.parent == tmp_path / "faces/test" / str(sample.label)
        assert sample.path.suffix == ".jpg" and Image.open(sample.path).size == (32, 32)
    (tmp_path / "faces/dataset.json").unlink()  # the published layout alone
    labels = [sample.label for sample in read_dataset(tmp_path / "faces", "rafdb").split("train")]
    assert labels == sorted(labels) and len(labels) == 14


def test_votes_are_the_distributions_of_the_faces(tmp_path):
    synthetic(tmp_path / "faces", "--seed", "5")
    samples = read_dataset(tmp_path / "faces").split("train")
    for sample, found in zip(samples, label_distributions(samples, 7), strict=True):
        face = render_face(5, int(sample.path.stem.removeprefix("face_")), 32)
        assert sample.label == face.label
        np.testing.assert_allclose(found, face.distribution, atol=1e-5)


def test_synthetic_faces_are_the_same_every_time(content, tmp_path):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        synthetic(tmp_path / out, "--seed", seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    changed = [name for name, data in content(tmp_path / "c").items() if name.endswith(".jpg")]
    assert all(
        content(tmp_path / "a").get(name) != content(tmp_path / "c")[name] for name in changed
    )


def test_variation_is_in_pictures_votes_and_description(tmp_path):
    synthetic(tmp_path / "all")
    synthetic(tmp_path / "less", "--variation", "0.5")
    whole, less = (read_dataset(tmp_path / name).split("train") for name in ("all", "less"))
    distributions = label_distributions(less, 7)
    for sample, found in zip(less, distributions, strict=True):
        index = int(sample.path.stem.removeprefix("face_"))
        np.testing.assert_allclose(found, render_face(0, index, 32, 0.5).distribution, atol=1e-5)
    assert (distributions.max(axis=1) >= label_distributions(whole, 7).max(axis=1)).all()
    described = [(tmp_path / name / "dataset.json").read_text() for name in ("all", "less")]
    assert [('"variation": 0.5' in text) for text in described] == [False, True]


def test_variation_outside_its_range_is_refused(tmp_path):
    for value in ("1.5", "-0.1", "nan"):
        with pytest.raises(ConfigError, match="--variation"):
            synthetic(tmp_path / "faces", f"--variation={value}")
    assert not (tmp_path / "faces").exists()
